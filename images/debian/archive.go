package debian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"ditto.vm/images/cache"
)

// keyring is where Debian's archive keys lie on every Debian machine.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// listsMaxAge is how old the package lists may be before they are fetched
// again. Backports move a few times a week.
const listsMaxAge = 7 * 24 * time.Hour

// Progress hears how far a slow step has come.
type Progress interface {
	// Report says that the step called what has come to the given fraction,
	// from 0 to 1. Every step that reports at all ends with a report of 1
	// unless it fails. It is called from one goroutine at a time.
	Report(what string, fraction float64)
}

// Archive fetches packages with a private apt configuration.
type Archive struct {
	root     string // cache root
	progress Progress
}

// Open prepares the private configuration below the cache root dir ("" means
// [cache.Dir]). It reads apt's configuration but contacts nobody. progress may
// be nil.
func Open(ctx context.Context, dir string, progress Progress) (*Archive, error) {
	if dir == "" {
		dir = cache.Dir()
	}
	for _, tool := range []string{"apt-get", "apt-cache", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("fetching Debian packages needs %s: %w", tool, err)
		}
	}
	a := &Archive{root: dir, progress: progress}
	m, err := findMirrors(ctx)
	if err != nil {
		return nil, err
	}
	unlock, err := cache.Lock(ctx, a.lockPath())
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := a.writeConfig(m); err != nil {
		return nil, err
	}
	return a, nil
}

// ConfigPath is the file to hand to apt-get -c and apt-cache -c.
func (a *Archive) ConfigPath() string { return a.path("apt.conf") }

func (a *Archive) path(elem ...string) string {
	return filepath.Join(append([]string{a.root, "apt"}, elem...)...)
}

func (a *Archive) lockPath() string { return a.path("lock") }

// Update fetches the package lists.
//
// Preconditions: none; it takes the archive's lock.
func (a *Archive) Update(ctx context.Context) error {
	unlock, err := cache.Lock(ctx, a.lockPath())
	if err != nil {
		return err
	}
	defer unlock()
	return a.update(ctx)
}

// update is Update with the lock held.
func (a *Archive) update(ctx context.Context) error {
	if _, err := a.aptGet(ctx, "", "package lists", "update"); err != nil {
		return err
	}
	return os.WriteFile(a.stamp(), nil, 0o644)
}

// stamp is touched by each successful update.
func (a *Archive) stamp() string { return a.path("updated") }

// refresh updates the lists when they are missing or old. Old lists that cannot
// be renewed are used as they are.
func (a *Archive) refresh(ctx context.Context) error {
	fi, err := os.Stat(a.stamp())
	if err == nil && time.Since(fi.ModTime()) < listsMaxAge {
		return nil
	}
	if uerr := a.Update(ctx); uerr != nil && err != nil {
		return uerr
	}
	return nil
}

// Names returns the names of all known packages that begin with prefix, sorted.
func (a *Archive) Names(ctx context.Context, prefix string) ([]string, error) {
	if err := a.refresh(ctx); err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, "apt-cache", "-c", a.ConfigPath(), "pkgnames", prefix).Output()
	if err != nil {
		return nil, commandError("apt-cache pkgnames", err)
	}
	names := strings.Fields(string(out))
	sort.Strings(names)
	return names, nil
}

// target is one file that apt would download.
type target struct {
	name string // file name of the .deb
	size int64  // bytes
}

// Fetch downloads packages into the cache and returns the paths of their .deb
// files in the same order. A package is named as apt-get download takes it:
// "fio", "fio=3.33-3", "fio/bookworm-backports". Dependencies are not fetched.
func (a *Archive) Fetch(ctx context.Context, pkgs ...string) ([]string, error) {
	if err := a.refresh(ctx); err != nil {
		return nil, err
	}
	paths := make([]string, len(pkgs))
	for i, pkg := range pkgs {
		path, err := a.fetch(ctx, pkg)
		if err != nil {
			return nil, fmt.Errorf("fetch %s: %w", pkg, err)
		}
		paths[i] = path
	}
	return paths, nil
}

func (a *Archive) fetch(ctx context.Context, pkg string) (string, error) {
	unlock, err := cache.Lock(ctx, a.lockPath())
	if err != nil {
		return "", err
	}
	defer unlock()
	path, err := a.fetchLocked(ctx, pkg)
	if err == nil || ctx.Err() != nil || errors.Is(err, os.ErrPermission) {
		return path, err
	}
	// The lists may name a version that the mirror has dropped meanwhile.
	if uerr := a.update(ctx); uerr != nil {
		return "", err
	}
	return a.fetchLocked(ctx, pkg)
}

func (a *Archive) fetchLocked(ctx context.Context, pkg string) (string, error) {
	t, err := a.resolve(ctx, pkg)
	if err != nil {
		return "", err
	}
	path := a.path("archives", t.name)
	if fi, err := os.Stat(path); err == nil && fi.Size() == t.size {
		return path, nil
	}
	tmp, err := os.MkdirTemp(a.path("archives"), ".download-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	if _, err := a.aptGet(ctx, tmp, pkg, "download", pkg); err != nil {
		return "", err
	}
	if err := os.Rename(filepath.Join(tmp, t.name), path); err != nil {
		return "", err
	}
	return path, nil
}

// resolve asks apt which file pkg stands for.
func (a *Archive) resolve(ctx context.Context, pkg string) (target, error) {
	out, err := a.aptGet(ctx, "", "", "download", "--print-uris", pkg)
	if err != nil {
		return target{}, err
	}
	return parseURI(string(out))
}

// parseURI reads the first line of apt-get --print-uris: 'URI' name size hash.
func parseURI(out string) (target, error) {
	line, _, _ := strings.Cut(strings.TrimSpace(out), "\n")
	f := strings.Fields(line)
	var t target
	if len(f) < 3 || !strings.HasPrefix(f[0], "'") {
		return target{}, fmt.Errorf("apt-get --print-uris said %q", line)
	}
	t.name = f[1]
	if t.name != filepath.Base(t.name) || !strings.HasSuffix(t.name, ".deb") {
		return target{}, fmt.Errorf("apt-get names an odd file %q", t.name)
	}
	if _, err := fmt.Sscanf(f[2], "%d", &t.size); err != nil {
		return target{}, fmt.Errorf("apt-get names an odd size %q", f[2])
	}
	return t, nil
}

// Unpack extracts a .deb into the cache and returns the folder, which is never
// changed afterwards. Unpacking the same file again returns the same folder.
func (a *Archive) Unpack(ctx context.Context, deb string) (string, error) {
	dst := a.UnpackedPath(strings.TrimSuffix(filepath.Base(deb), ".deb"))
	err := cache.MakeDir(ctx, dst, func(tmp string) error {
		a.report("unpack "+filepath.Base(deb), 0)
		if err := run(exec.CommandContext(ctx, "dpkg-deb", "-x", deb, tmp)); err != nil {
			return fmt.Errorf("unpack %s: %w", deb, err)
		}
		a.report("unpack "+filepath.Base(deb), 1)
		return nil
	})
	return dst, err
}

// UnpackedPath is the folder in which packages lie unpacked, or one of them.
func (a *Archive) UnpackedPath(elem ...string) string {
	return filepath.Join(append([]string{a.root, "debian"}, elem...)...)
}

// Ensure fetches and unpacks packages and returns their folders in order.
func (a *Archive) Ensure(ctx context.Context, pkgs ...string) ([]string, error) {
	debs, err := a.Fetch(ctx, pkgs...)
	if err != nil {
		return nil, err
	}
	dirs := make([]string, len(debs))
	for i, deb := range debs {
		if dirs[i], err = a.Unpack(ctx, deb); err != nil {
			return nil, err
		}
	}
	return dirs, nil
}

func (a *Archive) report(what string, fraction float64) {
	if a.progress != nil && what != "" {
		a.progress.Report(what, fraction)
	}
}

// run runs cmd and puts what it printed on stderr into the error.
func run(cmd *exec.Cmd) error {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, lastLine(stderr.String()))
	}
	return nil
}

func commandError(what string, err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return fmt.Errorf("%s: %w: %s", what, err, lastLine(string(exit.Stderr)))
	}
	return fmt.Errorf("%s: %w", what, err)
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}
