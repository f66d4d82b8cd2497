package debian

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseTargets(t *testing.T) {
	for name, tc := range map[string]struct {
		targets string
		want    mirrors
		err     error
	}{
		"debian 12 after update": {
			targets: "Debian|bookworm|main|http://mirror.example/debian/\n" +
				"Debian|bookworm-updates|main|http://mirror.example/debian/\n" +
				"Debian|bookworm-security|main|http://mirror.example/security/\n",
			want: mirrors{"http://mirror.example/debian/", "http://mirror.example/security/"},
		},
		"others' sources come first": {
			targets: "Docker|bookworm|main|http://docker.example/\n" +
				". nodistro|nodistro|main|http://node.example/\n" +
				"Debian|bookworm|main|http://mirror.example/debian/\n",
			want: mirrors{main: "http://mirror.example/debian/"},
		},
		"before the first update": {
			targets: "$(ORIGIN)|nodistro|main|http://node.example/\n" +
				"$(ORIGIN)|bookworm|stable|http://docker.example/\n" +
				"$(ORIGIN)|bookworm-security|main|http://mirror.example/security/\n" +
				"$(ORIGIN)|bookworm|main|http://mirror.example/debian/\n",
			want: mirrors{"http://mirror.example/debian/", "http://mirror.example/security/"},
		},
		"another release": {
			targets: "Debian|trixie|main|http://mirror.example/debian/\nDebian|trixie-security|main|http://mirror.example/security/\n",
			want:    mirrors{main: "http://mirror.example/debian/"},
		},
		"none": {
			targets: "Ubuntu|noble|main|http://ubuntu.example/\nnonsense\n|a|b|c\n",
			err:     ErrNoMirror,
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseTargets(tc.targets)
			if !errors.Is(err, tc.err) || got != tc.want {
				t.Errorf("parseTargets = %+v, %v; want %+v, %v", got, err, tc.want, tc.err)
			}
		})
	}
}

func TestParseURI(t *testing.T) {
	got, err := parseURI("'http://m/p/fio_3.33-3_amd64.deb' fio_3.33-3_amd64.deb 590652 SHA256:00\n")
	if err != nil || got != (target{"fio_3.33-3_amd64.deb", 590652}) {
		t.Errorf("parseURI = %+v, %v", got, err)
	}
	for _, bad := range []string{
		"", "fio", "'u' ../x.deb 1 h", "'u' x.deb many h", "'u' x.tar 1 h", "u x.deb 1 h",
	} {
		if got, err := parseURI(bad); err == nil {
			t.Errorf("parseURI(%q) = %+v, want an error", bad, got)
		}
	}
}

func FuzzParseURI(f *testing.F) {
	f.Add("'http://m/p/fio_3.33-3_amd64.deb' fio_3.33-3_amd64.deb 590652 SHA256:00\n")
	f.Fuzz(func(t *testing.T, out string) {
		got, err := parseURI(out)
		if err == nil && (strings.Contains(got.name, "/") || !strings.HasSuffix(got.name, ".deb")) {
			t.Errorf("%q was taken as a file name", got.name)
		}
	})
}

func TestAptError(t *testing.T) {
	got := aptError("W: old\nE: Unable to locate package nosuch\nE: Some files failed\n")
	if got != "Unable to locate package nosuch" {
		t.Errorf("aptError = %q", got)
	}
	if got := aptError("one\ntwo\n"); got != "two" {
		t.Errorf("aptError without E: = %q", got)
	}
}

type progress struct{ last float64 }

func (p *progress) Report(_ string, fraction float64) { p.last = fraction }

func TestFollow(t *testing.T) {
	p := &progress{}
	a := &Archive{progress: p}
	a.follow("x", strings.NewReader("dlstatus:1:12.5:Retrieving\npmstatus:a:99:b\ndlstatus:1:nan%:\ndlstatus:1:50:R\n"))
	if p.last != 0.5 {
		t.Errorf("last fraction = %v, want 0.5", p.last)
	}
}

// testArchive opens an archive in a temporary cache with a mirror that does
// not exist.
func testArchive(t *testing.T) *Archive {
	t.Helper()
	if _, err := exec.LookPath("apt-get"); err != nil {
		t.Skip("needs apt-get; this is not Debian")
	}
	t.Setenv(EnvMirror, "file:///nonexistent/debian")
	a, err := Open(t.Context(), t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestConfigIsPrivate asks apt itself what it would do with the configuration.
func TestConfigIsPrivate(t *testing.T) {
	a := testArchive(t)
	out, err := exec.Command("apt-config", "-c", a.ConfigPath(), "shell",
		"SOURCES", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/f", "LISTS", "Dir::State::lists/f",
		"ARCHIVES", "Dir::Cache::archives/f", "PKGCACHE", "Dir::Cache::pkgcache/f",
		"POST", "APT::Update::Post-Invoke", "SUCCESS", "APT::Update::Post-Invoke-Success").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		value = strings.Trim(value, "'")
		switch key {
		case "SOURCES":
			if value != "/dev/null" {
				t.Errorf("apt reads the sources in %s", value)
			}
		case "POST", "SUCCESS":
			if value == "" {
				continue
			}
			t.Errorf("apt runs the system's hook %s", value)
		default:
			if !strings.HasPrefix(value, a.root) {
				t.Errorf("apt uses %s for %s", value, key)
			}
		}
	}
	targets, err := exec.Command("apt-get", "-c", a.ConfigPath(), "indextargets", "--no-release-info",
		"--format", "$(REPO_URI) $(RELEASE)", "Identifier: Packages").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, suite := range []string{"bookworm", "bookworm-updates", "bookworm-backports"} {
		if !strings.Contains(string(targets), "file:/nonexistent/debian/ "+suite+"\n") {
			t.Errorf("apt would not read %s: %s", suite, targets)
		}
	}
	for line := range strings.Lines(string(targets)) {
		if !strings.HasPrefix(line, "file:/nonexistent/debian/ bookworm") {
			t.Errorf("apt would read %s", line)
		}
	}
}

func TestFetchWithoutMirror(t *testing.T) {
	a := testArchive(t)
	if _, err := a.Fetch(t.Context(), "fio"); err == nil {
		t.Error("a package was fetched from nowhere")
	}
}

// makeDeb builds a package that holds one file.
func makeDeb(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("dpkg-deb"); err != nil {
		t.Skip("needs dpkg-deb; this is not Debian")
	}
	tree := filepath.Join(t.TempDir(), "tree")
	for path, text := range map[string]string{
		"DEBIAN/control":  "Package: tiny\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n",
		"usr/share/hello": "hello",
	} {
		path = filepath.Join(tree, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	deb := filepath.Join(t.TempDir(), "tiny_1_all.deb")
	if out, err := exec.Command("dpkg-deb", "--root-owner-group", "-b", tree, deb).CombinedOutput(); err != nil {
		t.Fatalf("dpkg-deb: %v: %s", err, out)
	}
	return deb
}

func TestUnpack(t *testing.T) {
	a := &Archive{root: t.TempDir()}
	deb := makeDeb(t)
	dir, err := a.Unpack(t.Context(), deb)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(dir, "usr/share/hello"))
	if err != nil || string(got) != "hello" {
		t.Errorf("unpacked %q, %v", got, err)
	}
	again, err := a.Unpack(t.Context(), deb)
	if err != nil || again != dir {
		t.Errorf("a second Unpack: %q, %v; want %q", again, err, dir)
	}
}

func TestUnpackBadPackage(t *testing.T) {
	makeDeb(t) // for its skip
	a := &Archive{root: t.TempDir()}
	deb := filepath.Join(t.TempDir(), "bad_1_all.deb")
	if err := os.WriteFile(deb, []byte("not a package"), 0o644); err != nil {
		t.Fatal(err)
	}
	dir, err := a.Unpack(t.Context(), deb)
	if err == nil {
		t.Fatal("a file that is no package was unpacked")
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("a folder was left behind")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.Unpack(ctx, deb); err == nil {
		t.Error("Unpack worked with a context that had ended")
	}
}
