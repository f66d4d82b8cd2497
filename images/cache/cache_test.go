package cache

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
)

func TestDir(t *testing.T) {
	t.Setenv(EnvDir, "/somewhere")
	if got := Dir("a", "b"); got != "/somewhere/a/b" {
		t.Errorf("Dir = %q", got)
	}
	t.Setenv(EnvDir, "")
	if got := Dir("x"); filepath.Base(filepath.Dir(got)) != "ditto" {
		t.Errorf("Dir without %s = %q", EnvDir, got)
	}
}

func TestMakeDirOnce(t *testing.T) {
	dst := filepath.Join(t.TempDir(), "parent", "made")
	var fills atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			err := MakeDir(t.Context(), dst, func(tmp string) error {
				fills.Add(1)
				if _, err := os.Stat(dst); err == nil {
					t.Error("the folder exists while it is being made")
				}
				return os.WriteFile(filepath.Join(tmp, "file"), []byte("x"), 0o644)
			})
			if err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(filepath.Join(dst, "file")); err != nil {
				t.Errorf("MakeDir returned before the folder was complete: %v", err)
			}
		})
	}
	wg.Wait()
	if n := fills.Load(); n != 1 {
		t.Errorf("the folder was made %d times", n)
	}
}

func TestMakeDirFailureLeavesNothing(t *testing.T) {
	parent := t.TempDir()
	dst := filepath.Join(parent, "made")
	cause := errors.New("no")
	err := MakeDir(t.Context(), dst, func(tmp string) error {
		if err := os.WriteFile(filepath.Join(tmp, "half"), nil, 0o644); err != nil {
			return err
		}
		return cause
	})
	if !errors.Is(err, cause) {
		t.Fatalf("MakeDir: %v, want %v", err, cause)
	}
	entries, err := os.ReadDir(parent)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() {
			t.Errorf("%s was left behind", e.Name())
		}
	}
	if err := MakeDir(t.Context(), dst, func(string) error { return nil }); err != nil {
		t.Errorf("a second attempt: %v", err)
	}
}

func TestLockExcludesAndEndsWithContext(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := Lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Lock(ctx, path); !errors.Is(err, context.Canceled) {
		t.Fatalf("a held lock: %v, want context.Canceled", err)
	}
	unlock()
	unlock, err = Lock(t.Context(), path)
	if err != nil {
		t.Fatalf("a released lock: %v", err)
	}
	unlock()
}
