// Package mutants builds the tests of a package without its safeguards, so that
// they can be seen to fail: a test that passes without what it guards guards
// nothing.
//
//	sources --edits--> overlay --go test -c--> one binary with all mutants,
//	                                           of which Env chooses one
//
// The edited code asks mutated(name), which Build adds to the package, whether it
// is to be wrong. Nothing of the source tree is changed ("go help build",
// -overlay).
package mutants

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Env names the mutant that a binary of [Build] is. Without it all safeguards are
// there.
const Env = "DITTO_MUTANT"

// Edit replaces a text that stands in a file of the package once.
type Edit struct{ Name, File, Old, New string }

// source is what edited code calls.
const source = `package %s

import "os"

var activeMutant = os.Getenv(%q)

func mutated(name string) bool { return name == activeMutant }
`

// Build builds the tests of the package in the working directory with all edits
// in them, and returns the binary. It skips the test where there is no Go
// toolchain.
func Build(t testing.TB, pkg string, edits []Edit) (binary string) {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("no Go toolchain here; run it where the sources are")
	}
	dir := t.TempDir()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	sources := map[string]string{"mutant.go": fmt.Sprintf(source, pkg, Env)}
	for _, e := range edits {
		if _, ok := sources[e.File]; !ok {
			b, err := os.ReadFile(e.File)
			if err != nil {
				t.Fatal(err)
			}
			sources[e.File] = string(b)
		}
		if n := strings.Count(sources[e.File], e.Old); n != 1 {
			t.Fatalf("%s: the text to change stands %d times in %s", e.Name, n, e.File)
		}
		sources[e.File] = strings.Replace(sources[e.File], e.Old, e.New, 1)
	}
	overlay := struct{ Replace map[string]string }{map[string]string{}}
	for file, text := range sources {
		changed := filepath.Join(dir, file)
		overlay.Replace[filepath.Join(here, file)] = changed
		if err := os.WriteFile(changed, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b, err := json.Marshal(overlay)
	if err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(list, b, 0o600); err != nil {
		t.Fatal(err)
	}
	binary = filepath.Join(dir, "mutated.test")
	out, err := exec.Command("go", "test", "-c", "-vet=off", "-overlay", list, "-o", binary, ".").CombinedOutput()
	if err != nil {
		t.Fatalf("go test -c: %v\n%s", err, out)
	}
	return binary
}

// Run runs a test of such a binary as a mutant, "" for none, and returns its
// output.
func Run(binary, mutant, test string, flags []string, env ...string) ([]byte, error) {
	cmd := exec.Command(binary, append([]string{"-test.run", test}, flags...)...)
	cmd.Env = append(append(os.Environ(), Env+"="+mutant), env...)
	return cmd.CombinedOutput()
}
