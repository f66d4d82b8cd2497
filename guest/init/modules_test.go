package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

const testDep = `kernel/a/virtio.ko: kernel/a/virtio_ring.ko
kernel/a/virtio_ring.ko:
kernel/a/virtio_pci.ko: kernel/a/virtio.ko kernel/a/virtio_ring.ko
kernel/fs/ext4.ko: kernel/fs/jbd2.ko
kernel/fs/jbd2.ko:
kernel/crypto/crc32c-intel.ko.xz:
kernel/crypto/crc32c_generic.ko:
kernel/loop/a.ko: kernel/loop/b.ko
kernel/loop/b.ko: kernel/loop/a.ko
# a comment: x
`

const testAlias = `# Aliases
alias pci:v00001AF4d*sv*sd*bc*sc*i* virtio_pci
alias fs-ext4 ext4
alias ext3 ext4
alias crypto-crc32c crc32c_generic
alias crypto-crc32c crc32c_intel
alias gone missing_module
broken line
`

func TestResolve(t *testing.T) {
	x := parseIndex("/m", testDep, testAlias)
	for _, tc := range []struct {
		name string
		want []string
	}{
		{"virtio_pci", []string{"kernel/a/virtio_ring.ko", "kernel/a/virtio.ko", "kernel/a/virtio_pci.ko"}},
		{"virtio-pci", []string{"kernel/a/virtio_ring.ko", "kernel/a/virtio.ko", "kernel/a/virtio_pci.ko"}},
		{"pci:v00001AF4d00001042sv00001AF4sd00001100bc01sc80i00", []string{"kernel/a/virtio_ring.ko", "kernel/a/virtio.ko", "kernel/a/virtio_pci.ko"}},
		{"pci:v00008086d00001042sv00001AF4sd00001100bc01sc80i00", nil},
		{"fs-ext4", []string{"kernel/fs/jbd2.ko", "kernel/fs/ext4.ko"}},
		{"crypto-crc32c", []string{"kernel/crypto/crc32c_generic.ko", "kernel/crypto/crc32c-intel.ko.xz"}},
		{"gone", nil},
		{"a", []string{"kernel/loop/b.ko", "kernel/loop/a.ko"}},
	} {
		if diff := cmp.Diff(tc.want, x.resolve(tc.name)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, diff)
		}
	}
}

// fakeLoader records what would be loaded.
func fakeLoader(fail map[string]error) (*loader, *[]string) {
	var got []string
	l := &loader{
		index: parseIndex("/m", testDep, testAlias), done: map[string]bool{},
		params: moduleParams(splitCmdline("virtio_pci.x=1 virtio-pci.y virtio.z=a,b quiet ditto.run=x")),
	}
	l.insert = func(path, params string) error {
		name := moduleName(path)
		if params != "" {
			name += " " + params
		}
		got = append(got, name)
		return fail[moduleName(path)]
	}
	return l, &got
}

func TestLoad(t *testing.T) {
	l, got := fakeLoader(map[string]error{"virtio": unix.EEXIST, "jbd2": unix.ENOEXEC})
	if found, err := l.load("virtio_pci"); !found || err != nil {
		t.Errorf("found %v, err %v", found, err)
	}
	if found, err := l.load("virtio_pci"); !found || err != nil {
		t.Errorf("again: found %v, err %v", found, err)
	}
	want := []string{"virtio_ring", "virtio z=a,b", "virtio_pci x=1 y"}
	if diff := cmp.Diff(want, *got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if l.loaded != 2 {
		t.Errorf("loaded %d, want 2: virtio was there already", l.loaded)
	}
	if _, err := l.load("ext4"); !errors.Is(err, unix.ENOEXEC) {
		t.Errorf("err %v, want ENOEXEC", err)
	}
	if found, err := l.load("nothing"); found || err != nil {
		t.Errorf("found %v, err %v", found, err)
	}
}

// TestColdplug grows the bus while modules load, as a transport does.
func TestColdplug(t *testing.T) {
	sysfs := t.TempDir()
	device := func(path, alias string) {
		p := filepath.Join(sysfs, path, "modalias")
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(alias+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	device("bus/pci/devices/0000:00:01.0", "pci:v00001AF4d00001042sv0sd0bc01sc80i00")
	device("bus/pci/devices/0000:00:00.0", "pci:v00008086d00000000sv0sd0bc06sc00i00")
	l, got := fakeLoader(nil)
	l.index.aliases = append(l.index.aliases, moduleAlias{"virtio:d00000002v*", "jbd2"})
	insert := l.insert
	l.insert = func(path, params string) error {
		if moduleName(path) == "virtio_pci" {
			device("bus/virtio/devices/virtio0", "virtio:d00000002v00001AF4")
		}
		return insert(path, params)
	}
	if errs := l.coldplug(sysfs); errs != nil {
		t.Errorf("errors: %v", errs)
	}
	if !slices.Contains(*got, "jbd2") {
		t.Errorf("the device that appeared got no module: %v", *got)
	}
}

func TestNewLoaderWithoutModules(t *testing.T) {
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "6.1.0"), 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := newLoader(root, "6.12.0", nil)
	if err == nil || !strings.Contains(err.Error(), "6.1.0") {
		t.Errorf("err %v, want one that names the release at hand", err)
	}
	if found, _ := l.load("virtio_pci"); found {
		t.Error("found a module in nothing")
	}
}

func FuzzModuleIndex(f *testing.F) {
	f.Add(testDep, testAlias, "virtio_pci")
	f.Add("a.ko: b.ko c.ko\nb.ko: a.ko\n", "alias * a", "x")
	f.Fuzz(func(t *testing.T, dep, alias, name string) {
		x := parseIndex("/m", dep, alias)
		seen := map[string]bool{}
		for _, file := range x.resolve(name) {
			if seen[file] {
				t.Errorf("%q twice", file)
			}
			seen[file] = true
		}
	})
}

func TestMatchAlias(t *testing.T) {
	for _, tc := range []struct {
		pattern, name string
		want          bool
	}{
		{"", "", true}, {"*", "", true}, {"*", "anything", true}, {"a", "", false}, {"", "a", false},
		{"a?c", "abc", true}, {"a?c", "ac", false}, {"a*c*e", "abcde", true}, {"a*c*e", "abcdf", false},
		{"a**b", "ab", true}, {"[a-c]x", "bx", true}, {"[a-c]x", "dx", false}, {"[!a]x", "bx", true}, {"[^a]x", "ax", false},
		{"[ab", "[ab", true}, {"[]x", "[]x", false}, {"virtio:d00000001v*", "virtio:d00000001v00001AF4", true},
		{"input:b*v*p*e*_e*1,*k*r*a*m*l*s*f*w*", "input:b0019v0000p0001e0000_e0,1,k74,ramlsfw", true},
		{strings.Repeat("a*", 30) + "b", strings.Repeat("a", 5000), false},
	} {
		if got := matchAlias(tc.pattern, tc.name); got != tc.want {
			t.Errorf("matchAlias(%.20q, %.20q) = %v", tc.pattern, tc.name, got)
		}
	}
	if got := normalize("a-b[c-d]e-f"); got != "a_b[c-d]e_f" {
		t.Errorf("normalize: %q", got)
	}
}

// FuzzMatchAlias compares with filepath.Match where the two agree on syntax.
func FuzzMatchAlias(f *testing.F) {
	f.Add("a*b?[c-e]", "axxbyd")
	f.Add("*a*a*a*", "aaaa")
	f.Fuzz(func(t *testing.T, pattern, name string) {
		got := matchAlias(pattern, name)
		if strings.ContainsAny(pattern, `\[/`) || strings.Contains(name, "/") || !ascii(pattern) || !ascii(name) {
			return
		}
		want, err := filepath.Match(pattern, name)
		if err == nil && got != want {
			t.Errorf("matchAlias(%q, %q) = %v, filepath.Match says %v", pattern, name, got, want)
		}
	})
}

func ascii(s string) bool {
	for i := range len(s) {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}
