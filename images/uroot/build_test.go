package uroot

import (
	"context"
	"errors"
	"flag"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"ditto.vm/images/kernel"
)

var update = flag.Bool("update", false, "regenerate module/gomod.txt and module/gosum.txt (needs the module proxy)")

func source(text string) fs.FS {
	return fstest.MapFS{
		"main.go":      {Data: []byte("package main\n\nfunc main() { " + text + " }\n")},
		"main_test.go": {Data: []byte("package main\n\nthis does not compile\n")},
	}
}

// TestBuild builds an image of two commands: it compiles them and a program in
// place of the init, packs modules of no kernel, and finds it all in the cache.
func TestBuild(t *testing.T) {
	if testing.Short() {
		t.Skip("compiles u-root's builder: run without -short")
	}
	if _, err := findGo(""); err != nil {
		t.Skip(err)
	}
	o := Options{
		CacheDir: t.TempDir(), Init: source(`println("hello")`),
		Commands: []string{"github.com/u-root/u-root/cmds/core/echo", "github.com/u-root/u-root/cmds/core/gosh"},
		Run:      "echo hi",
	}
	if _, ok := Cached(o); ok {
		t.Fatal("an empty cache has the image")
	}
	img, err := Build(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	archive, err := os.ReadFile(img.Path)
	if err != nil {
		t.Fatal(err)
	}
	got, _ := readBack(t, archive)
	for _, name := range []string{"init", "bbin/bb", "bbin/echo", "bin/sh", "etc/ditto/run", "dev/console"} {
		if _, ok := got[name]; !ok {
			t.Errorf("the archive lacks %s", name)
		}
	}
	if img.Commands != 2 || img.SizeBytes != int64(len(archive)) {
		t.Errorf("manifest says %+v; the archive has %d bytes", img, len(archive))
	}
	runInit(t, contents(t, got["init"]))

	o.GoCommand = "/nonexistent/go" // the cache needs none
	again, err := Build(context.Background(), o)
	if err != nil || again.Path != img.Path {
		t.Errorf("second build: %+v, %v", again, err)
	}
	if _, ok := Cached(o); !ok {
		t.Error("not cached after Build")
	}
	if left, _ := filepath.Glob(filepath.Join(o.CacheDir, "uroot/.build-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	o.Run = "echo other"
	if again, err = Build(context.Background(), o); err != nil || again.Path == img.Path {
		t.Errorf("another command: %+v, %v; want another image from the cached parts", again, err)
	}
}

// runInit runs the packed program, which must be static: nothing else is in
// its root.
func runInit(t *testing.T, program []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "init")
	if err := os.WriteFile(path, program, 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(path).CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "hello" {
		t.Errorf("the packed init: %v, %q", err, out)
	}
}

func TestBuildErrors(t *testing.T) {
	for name, tc := range map[string]struct {
		o    Options
		want error
	}{
		"no sources": {Options{}, nil},
		"no go":      {Options{Init: source(""), GoCommand: "/nonexistent/go"}, ErrNoGo},
		"bad path":   {Options{Init: source(""), Files: map[string]string{"/etc/x": "/etc/hostname"}}, nil},
		"missing":    {Options{Init: source(""), Files: map[string]string{"etc/x": "/nonexistent"}}, fs.ErrNotExist},
	} {
		t.Run(name, func(t *testing.T) {
			tc.o.CacheDir = t.TempDir()
			_, err := Build(context.Background(), tc.o)
			if err == nil || tc.want != nil && !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
			if left, _ := filepath.Glob(filepath.Join(tc.o.CacheDir, "uroot/[a-z0-9]*")); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestGoErrorNamesTheCure(t *testing.T) {
	dir := t.TempDir()
	fake := filepath.Join(dir, "go")
	script := "#!/bin/sh\necho 'go: github.com/x/y@v1: dial tcp 192.0.2.1:443: connection refused' >&2\nexit 1\n"
	if err := os.WriteFile(fake, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	o := Options{CacheDir: dir, Init: source(""), GoCommand: fake}
	if _, err := Build(context.Background(), o); !errors.Is(err, ErrNoModules) || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("got %v, want ErrNoModules with go's words", err)
	}
}

func TestKeys(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "modules.order"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	extra := filepath.Join(dir, "extra")
	if err := os.WriteFile(extra, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	base := Options{Init: source("")}
	seen := map[string]string{}
	for name, o := range map[string]Options{
		"base": base, "init": {Init: source("println(1)")}, "run": {Init: base.Init, Run: "x"},
		"tags": {Init: base.Init, Tags: []string{}}, "commands": {Init: base.Init, Commands: []string{"x"}},
		"modules": {Init: base.Init, Modules: []string{"x"}}, "files": {Init: base.Init, Files: map[string]string{"x": extra}},
		"kernel":  {Init: base.Init, Kernel: kernel.Kernel{Version: "6.1"}},
		"kernel2": {Init: base.Init, Kernel: kernel.Kernel{Version: "6.1", ModulesDir: dir}},
	} {
		k, err := o.imageKey()
		if err != nil {
			t.Fatal(err)
		}
		if other, dup := seen[k]; dup {
			t.Errorf("%s and %s have one key", name, other)
		}
		seen[k] = name
		if again, _ := o.imageKey(); again != k {
			t.Errorf("%s: the key is not stable", name)
		}
	}
}

func TestSplitVersions(t *testing.T) {
	plain, get := splitVersions([]string{"a/b", "c/d@v1.2.3", "-e"})
	if strings.Join(plain, " ") != "a/b c/d -e" || strings.Join(get, " ") != "c/d@v1.2.3" {
		t.Errorf("got %q %q", plain, get)
	}
}

// TestModuleFiles keeps the embedded module in step with the project's: the
// same u-root and x/sys. With -update it is made anew from module/deps.go.txt.
func TestModuleFiles(t *testing.T) {
	main, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	versions := map[string]string{}
	for _, m := range []string{"github.com/u-root/u-root", "golang.org/x/sys"} {
		versions[m] = required(string(main), m)
	}
	if *update {
		regenerate(t, versions)
		return
	}
	for m, v := range versions {
		if got := required(string(goMod), m); got != v || v == "" {
			t.Errorf("%s is %q in module/gomod.txt and %q in go.mod; run go test ./images/uroot -run ModuleFiles -update", m, got, v)
		}
		if !strings.Contains(string(goSum), m+" "+versions[m]+" h1:") {
			t.Errorf("module/gosum.txt lacks %s %s", m, v)
		}
	}
}

func required(gomod, module string) string {
	for line := range strings.Lines(gomod) {
		f := strings.Fields(strings.TrimPrefix(strings.TrimSpace(line), "require "))
		if len(f) >= 2 && f[0] == module {
			return f[1]
		}
	}
	return ""
}

func regenerate(t *testing.T, versions map[string]string) {
	t.Helper()
	dir := t.TempDir()
	deps, err := os.ReadFile("module/deps.go.txt")
	if err != nil {
		t.Fatal(err)
	}
	mod := "module initramfs.ditto.vm\n\ngo 1.26.0\n\nrequire (\n"
	for _, m := range []string{"github.com/u-root/u-root", "golang.org/x/sys"} {
		mod += "\t" + m + " " + versions[m] + "\n"
	}
	write := func(name string, data []byte) {
		if err := os.WriteFile(name, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(dir, "deps.go"), deps)
	write(filepath.Join(dir, "go.mod"), []byte(mod+")\n"))
	path, err := findGo("")
	if err != nil {
		t.Fatal(err)
	}
	if err := (goTool{path: path, dir: dir}).run(context.Background(), "mod", "tidy"); err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{"go.mod": "module/gomod.txt", "go.sum": "module/gosum.txt"} {
		b, err := os.ReadFile(filepath.Join(dir, from))
		if err != nil {
			t.Fatal(err)
		}
		write(to, b)
	}
}
