package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/adrg/xdg"
	"golang.org/x/sys/unix"
)

// EnvDir names the environment variable that moves the cache.
const EnvDir = "DITTO_CACHE"

// Dir returns the path of elem below the cache root. It creates nothing.
func Dir(elem ...string) string {
	root := os.Getenv(EnvDir)
	if root == "" {
		root = filepath.Join(xdg.CacheHome, "ditto")
	}
	return filepath.Join(append([]string{root}, elem...)...)
}

// lockPoll is how often Lock looks again for a lock that another process holds.
// flock has no form that ends with a context.
const lockPoll = 50 * time.Millisecond

// Lock takes an exclusive lock on the file at path, creating it, and waits for
// other processes until ctx ends. The lock goes with the returned function, or
// with the process.
func Lock(ctx context.Context, path string) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("cache lock: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("cache lock: %w", err)
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			_ = f.Close()
			return nil, fmt.Errorf("waiting for %s, held by another process: %w", path, ctx.Err())
		case <-time.After(lockPoll):
		}
	}
}

// MakeDir makes the folder dst by calling fill with a temporary folder beside
// it, which is then renamed. If dst exists nothing is done. Of several
// processes that make the same folder at once, one works and the others wait.
func MakeDir(ctx context.Context, dst string, fill func(tmp string) error) error {
	if isDir(dst) {
		return nil
	}
	parent, base := filepath.Split(filepath.Clean(dst))
	unlock, err := Lock(ctx, filepath.Join(parent, "."+base+".lock"))
	if err != nil {
		return err
	}
	defer unlock()
	if isDir(dst) {
		return nil
	}
	tmp, err := os.MkdirTemp(parent, "."+base+".new-")
	if err != nil {
		return fmt.Errorf("cache: %w", err)
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	if err := os.Chmod(tmp, 0o755); err != nil {
		return fmt.Errorf("cache: %w", err)
	}
	if err := fill(tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, dst); err != nil {
		return fmt.Errorf("cache: %w", err)
	}
	return nil
}

func isDir(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.IsDir()
}
