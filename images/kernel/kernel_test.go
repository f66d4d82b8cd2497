package kernel

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestParseSpec(t *testing.T) {
	for s, want := range map[string]spec{
		"6.12":                  {"6.12", Generic},
		"6.12-cloud":            {"6.12", Cloud},
		"6.12-generic":          {"6.12", Generic},
		"cloud":                 {"", Cloud},
		"generic":               {"", Generic},
		"6.1.0-50":              {"6.1.0-50", Generic},
		"6.1.0-50-cloud-amd64":  {"6.1.0-50", Cloud},
		"6.12.90+deb12.1-amd64": {"6.12.90+deb12.1", Generic},
		"6.1-rt":                {"6.1", RT},
		"6":                     {"6", Generic},
	} {
		if got, err := parseSpec(s); err != nil || got != want {
			t.Errorf("parseSpec(%q) = %+v, %v; want %+v", s, got, err, want)
		}
	}
	for _, s := range []string{"", "x", "-cloud", "6.", "6..1", "amd64", "6.12 cloud", "6.12-clouds!", "bzImage", "-amd64"} {
		if got, err := parseSpec(s); err == nil {
			t.Errorf("parseSpec(%q) = %+v, want an error", s, got)
		}
	}
}

func FuzzParseSpec(f *testing.F) {
	for _, s := range []string{"6.12-cloud", "6.1.0-50-cloud-amd64", "cloud", "-amd64", "6.12.90+deb12.1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		sp, err := parseSpec(s)
		if err != nil {
			return
		}
		// A version becomes part of a package name.
		if strings.ContainsAny(sp.version, "/ \n'") {
			t.Errorf("parseSpec(%q) took the version %q", s, sp.version)
		}
		if sp.version == "" {
			return
		}
		release := sp.version + "-" + sp.flavour + "-amd64"
		if sp.flavour == Generic {
			release = sp.version + "-amd64"
		}
		if _, flavour := splitRelease(release); flavour == sp.flavour && !sp.matches(release) {
			t.Errorf("%+v does not match %s", sp, release)
		}
	})
}

func TestMatches(t *testing.T) {
	for _, tc := range []struct {
		spec, release string
		want          bool
	}{
		{"6.12", "6.12.95+deb12-amd64", true},
		{"6.12", "6.12.95+deb12-cloud-amd64", false},
		{"6.12-cloud", "6.12.95+deb12-cloud-amd64", true},
		{"6.1", "6.12.95+deb12-amd64", false},
		{"6.1", "6.1.0-50-amd64", true},
		{"6.1.0-5", "6.1.0-50-amd64", false},
		{"cloud", "6.1.0-50-cloud-amd64", true},
		{"generic", "6.1.0-50-cloud-amd64", false},
		{"6.12", "6.12.95+deb12-amd64-unsigned", false},
		{"6.12", "6.12.0-custom", false},
	} {
		sp, err := parseSpec(tc.spec)
		if err != nil {
			t.Fatal(err)
		}
		if got := sp.matches(tc.release); got != tc.want {
			t.Errorf("%s matches %s: %v, want %v", tc.spec, tc.release, got, tc.want)
		}
	}
}

func TestNewestRelease(t *testing.T) {
	packages := []string{
		"linux-image-6.1.0-9-amd64", "linux-image-6.1.0-50-amd64", "linux-image-6.1.0-50-amd64-unsigned",
		"linux-image-6.12.90+deb12-amd64", "linux-image-6.12.90+deb12.1-amd64", "linux-image-6.12.117+deb12-amd64",
		"linux-image-6.12.95+deb12-cloud-amd64", "linux-image-6.12.117+deb12-amd64-dbg", "linux-image-amd64",
	}
	for spec, want := range map[string]string{
		"6.12":       "6.12.117+deb12-amd64",
		"6.12.90":    "6.12.90+deb12.1-amd64",
		"6.12-cloud": "6.12.95+deb12-cloud-amd64",
		"6.1":        "6.1.0-50-amd64",
		"6.13":       "",
	} {
		sp, err := parseSpec(spec)
		if err != nil {
			t.Fatal(err)
		}
		if got := newestRelease(sp, packages); got != want {
			t.Errorf("newest %s = %q, want %q", spec, got, want)
		}
	}
}

// fakePackage lays an unpacked kernel package into the cache at root.
func fakePackage(t *testing.T, root, release string) {
	t.Helper()
	dir := filepath.Join(root, "debian", "linux-image-"+release+"_1_amd64")
	for _, path := range []string{"boot/vmlinuz-" + release, "boot/config-" + release, "lib/modules/" + release + "/modules.builtin"} {
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestStore(t *testing.T) {
	root := t.TempDir()
	s := NewStore(root, nil)
	if ks, err := s.List(); err != nil || len(ks) != 0 {
		t.Fatalf("an empty cache lists %v, %v", ks, err)
	}
	if _, err := s.Find(""); !errors.Is(err, ErrNotCached) {
		t.Errorf("Find in an empty cache: %v", err)
	}
	for _, r := range []string{"6.1.0-50-amd64", "6.12.9+deb12-amd64", "6.12.117+deb12-cloud-amd64", "6.12.117+deb12-amd64"} {
		fakePackage(t, root, r)
	}
	if err := os.MkdirAll(filepath.Join(root, "debian", "linux-image-6.99.0-amd64_1_amd64"), 0o755); err != nil {
		t.Fatal(err) // without an image
	}
	ks, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, k := range ks {
		got = append(got, k.Version)
	}
	want := []string{"6.12.117+deb12-amd64", "6.12.117+deb12-cloud-amd64", "6.12.9+deb12-amd64", "6.1.0-50-amd64"}
	if !slices.Equal(got, want) {
		t.Errorf("List = %v, want %v", got, want)
	}
	for spec, want := range map[string]string{
		"": "6.12.117+deb12-amd64", "6.12-cloud": "6.12.117+deb12-cloud-amd64", "6.12.9": "6.12.9+deb12-amd64", "6.1": "6.1.0-50-amd64",
	} {
		k, err := s.Ensure(t.Context(), spec)
		if err != nil || k.Version != want {
			t.Errorf("Ensure(%q) = %s, %v; want %s", spec, k.Version, err, want)
		}
		if k.ModulesDir == "" || k.Config == "" || k.Flavour == "" {
			t.Errorf("Ensure(%q) = %+v lacks something", spec, k)
		}
	}
	if _, err := s.Find("6.6"); !errors.Is(err, ErrNotCached) {
		t.Errorf("Find(6.6): %v", err)
	}
	if _, err := s.Find("nonsense"); err == nil || errors.Is(err, ErrNotCached) {
		t.Errorf("Find(nonsense): %v", err)
	}
}

// fakeBzImage is a setup header whose version string says version.
func fakeBzImage(version string) []byte {
	b := make([]byte, 0x400)
	copy(b[offSetupMagic:], "HdrS")
	binary.LittleEndian.PutUint16(b[offKernelVersion:], 0x100)
	copy(b[0x300:], version+" (builder) #1\x00")
	return b
}

func TestFromFile(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("lib/modules/6.1.0-50-amd64/modules.builtin", nil)
	s := NewStore(t.TempDir(), nil)

	k, err := s.Find(write("bzImage", fakeBzImage("6.1.0-50-amd64")))
	if err != nil || k.Version != "6.1.0-50-amd64" || k.Flavour != Generic || !strings.HasSuffix(k.ModulesDir, "lib/modules/6.1.0-50-amd64") {
		t.Errorf("bzImage: %+v, %v", k, err)
	}
	k, err = s.Find(write("vmlinux-9.9.9", []byte("\x7fELF")))
	if err != nil || k.Version != "9.9.9" || k.ModulesDir != "" {
		t.Errorf("vmlinux: %+v, %v", k, err)
	}
	if k, err = s.Find(write("Image", []byte("x"))); err != nil || k.Version != "" {
		t.Errorf("an image without a version: %+v, %v", k, err)
	}
	if _, err := s.Find(filepath.Join(dir, "missing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing image: %v", err)
	}
	if _, err := s.Find(dir + "/"); err == nil {
		t.Error("a folder was taken as a kernel")
	}
}

func TestImageVersionStaysInItsFolder(t *testing.T) {
	for _, version := range []string{"../../etc", ".hidden", "a/b"} {
		path := filepath.Join(t.TempDir(), "bzImage")
		if err := os.WriteFile(path, fakeBzImage(version), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := fileVersion(path); got != "" {
			t.Errorf("version %q of an image was taken as %q", version, got)
		}
	}
}

func TestCompareVersions(t *testing.T) {
	sorted := []string{"", "6.1.0-9", "6.1.0-50", "6.1.0-50a", "6.12", "6.12.9+deb12", "6.12.90+deb12", "6.12.90+deb12.1", "6.12.117"}
	for i, a := range sorted {
		for j, b := range sorted {
			if got, want := compareVersions(a, b), max(-1, min(1, i-j)); got != want {
				t.Errorf("compareVersions(%q, %q) = %d, want %d", a, b, got, want)
			}
		}
	}
}
