package labrun

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// testPackage is a package whose tests can be compiled.
type testPackage struct {
	ImportPath   string
	Dir          string
	TestGoFiles  []string
	XTestGoFiles []string
	binary       string
}

// listPackages resolves patterns as the go command does.
func listPackages(ctx context.Context, patterns ...string) ([]testPackage, error) {
	args := append([]string{"list", "-json=ImportPath,Dir,TestGoFiles,XTestGoFiles"}, patterns...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list %s: %w", strings.Join(patterns, " "), err)
	}
	var pkgs []testPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p testPackage
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return pkgs, nil
		}
		if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		if len(p.TestGoFiles)+len(p.XTestGoFiles) > 0 {
			pkgs = append(pkgs, p)
		}
	}
}

// compile builds the test binary of p in dir. Tests run statically linked, as
// ditto does.
func (p *testPackage) compile(ctx context.Context, dir string) error {
	p.binary = filepath.Join(dir, strings.ReplaceAll(strings.TrimPrefix(p.ImportPath, "ditto.vm/"), "/", "-")+".test")
	return goTool(ctx, "test", "-c", "-vet=off", "-buildvcs=false", "-o", p.binary, p.ImportPath)
}

// tests lists the tests of the compiled binary that a pattern matches.
func (p *testPackage) tests(ctx context.Context, pattern string) ([]string, error) {
	cmd := exec.CommandContext(ctx, p.binary, "-test.list="+pattern)
	cmd.Dir, cmd.Stderr = p.Dir, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list the tests of %s: %w", p.ImportPath, err)
	}
	var names []string
	for name := range strings.FieldsSeq(string(out)) {
		if strings.HasPrefix(name, "Test") {
			names = append(names, name)
		}
	}
	return names, nil
}

// buildCommands builds the commands that tests run, for EnvBin.
func buildCommands(ctx context.Context, dir string) error {
	return goTool(ctx, "build", "-buildvcs=false", "-o", dir+string(filepath.Separator), "./cmd/...")
}

func goTool(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("go %s: %w\n%s", args[0], err, out)
	}
	return nil
}
