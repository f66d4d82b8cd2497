package uroot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// ErrNoGo says that this machine has no Go toolchain.
var ErrNoGo = errors.New("no Go toolchain found: u-root's commands are compiled on this machine; " +
	"install Go 1.26 or newer and have go in PATH, or pass an initramfs of your own")

// ErrNoModules says that modules could be neither found nor fetched.
var ErrNoModules = errors.New("some Go modules are missing: allow access to the module proxy once (see go env GOPROXY), " +
	"or copy a filled module cache (go env GOMODCACHE) to this machine")

// goTool runs the go command in one folder.
type goTool struct{ path, dir string }

// findGo finds the go command.
func findGo(given string) (string, error) {
	candidates := []string{given}
	if given == "" {
		candidates = []string{"go"}
		if root := os.Getenv("GOROOT"); root != "" {
			candidates = append(candidates, filepath.Join(root, "bin/go"))
		}
		candidates = append(candidates, "/usr/local/go/bin/go", "/usr/lib/go/bin/go")
	}
	for _, c := range candidates {
		if p, err := exec.LookPath(c); err == nil {
			return p, nil
		}
	}
	if given != "" {
		return "", fmt.Errorf("%s: %w", given, ErrNoGo)
	}
	return "", ErrNoGo
}

// environment makes builds independent of the caller's workspace and flags,
// and the binaries static.
func (g goTool) environment() []string {
	drop := []string{"GOFLAGS=", "GO111MODULE=", "GOWORK=", "CGO_ENABLED=", "GOOS=", "GOARCH=", "GOAMD64=", "PATH=", "PWD="}
	var env []string
next:
	for _, e := range os.Environ() {
		for _, d := range drop {
			if strings.HasPrefix(e, d) {
				continue next
			}
		}
		env = append(env, e)
	}
	return append(env, "GO111MODULE=on", "GOWORK=off", "GOFLAGS=-buildvcs=false", "CGO_ENABLED=0",
		"GOOS=linux", "GOARCH=amd64", "GOAMD64=v1", "PWD="+g.dir,
		"PATH="+filepath.Dir(g.path)+string(os.PathListSeparator)+os.Getenv("PATH"))
}

// run runs go with arguments.
func (g goTool) run(ctx context.Context, args ...string) error {
	return g.exec(ctx, g.path, args...)
}

// exec runs a program in the module's folder. Its error carries the last lines
// the program printed, and the cure when it was about missing modules.
func (g goTool) exec(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env = g.dir, g.environment()
	cmd.WaitDelay = 5 * time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	err = fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args[:min(len(args), 2)], " "), err, lastLines(out.String(), 8))
	if missingModules(out.String()) {
		return fmt.Errorf("%w\n%w", ErrNoModules, err)
	}
	return err
}

// missingModules recognizes what go says when it cannot fetch a module.
func missingModules(out string) bool {
	for _, s := range []string{
		"module lookup disabled", "dial tcp", "connection refused", "no such host",
		"i/o timeout", "TLS handshake", "missing go.sum entry", "toolchain not available",
	} {
		if strings.Contains(out, s) {
			return true
		}
	}
	return false
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "\n")
}
