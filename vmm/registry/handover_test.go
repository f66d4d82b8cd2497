package registry

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// staged makes what a process has that is about to take a name over.
func staged(t *testing.T, l *Lease) {
	t.Helper()
	for _, path := range []string{l.APISocket(), l.ConsoleSocket(), l.OpsSocket()} {
		if err := os.WriteFile(path, []byte("new"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Stage(State{CPUs: 7}); err != nil {
		t.Fatal(err)
	}
}

// adopt lets a second lease share the name of a first.
func adopt(t *testing.T, r *Registry, first *Lease) *Lease {
	t.Helper()
	lock, err := first.Lock()
	if err != nil {
		t.Fatal(err)
	}
	second, err := r.Adopt(first.Name, lock)
	if err != nil {
		t.Fatal(err)
	}
	return second
}

// TestTakeOver: the name is never free, and every file is the new process's when it
// has taken over.
func TestTakeOver(t *testing.T) {
	r := newRegistry(t)
	first, err := r.Acquire("web")
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Publish(State{CPUs: 2}); err != nil {
		t.Fatal(err)
	}
	taken := func() {
		t.Helper()
		if _, err := r.Acquire("web"); !errors.Is(err, ErrInUse) {
			t.Errorf("the name is free: %v", err)
		}
	}
	second := adopt(t, r, first)
	staged(t, second)
	if vm, err := r.Find("web"); err != nil || vm.CPUs != 2 {
		t.Errorf("before it is taken over: %+v, %v", vm, err)
	}
	if err := second.TakeOver(); err != nil {
		t.Fatal(err)
	}
	if vm, err := r.Find("web"); err != nil || vm.CPUs != 7 {
		t.Errorf("taken over: %+v, %v", vm, err)
	}
	taken()
	if err := first.Yield(); err != nil {
		t.Error(err)
	}
	taken()
	if text, err := os.ReadFile(second.APISocket()); err != nil || string(text) != "new" || filepath.Base(second.APISocket()) != apiName {
		t.Errorf("%s: %q, %v", second.APISocket(), text, err)
	}
	if err := second.Release(); err != nil {
		t.Fatal(err)
	}
	again, err := r.Acquire("web")
	if err != nil {
		t.Fatalf("released, the name is not free: %v", err)
	}
	if err := again.Release(); err != nil {
		t.Error(err)
	}
}

// TestForsaken: a process that does not take over leaves the other one all it has.
func TestForsaken(t *testing.T) {
	r := newRegistry(t)
	first, err := r.Acquire("web")
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Publish(State{CPUs: 2}); err != nil {
		t.Fatal(err)
	}
	before, err := filepath.Glob(filepath.Join(first.Dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	second := adopt(t, r, first)
	staged(t, second)
	if err := second.Release(); err != nil {
		t.Fatal(err)
	}
	after, err := filepath.Glob(filepath.Join(first.Dir, "*"))
	if err != nil || strings.Join(after, " ") != strings.Join(before, " ") {
		t.Errorf("there is %q, was %q, %v", after, before, err)
	}
	if vm, err := r.Find("web"); err != nil || vm.CPUs != 2 {
		t.Errorf("%+v, %v", vm, err)
	}
	if _, err := r.Acquire("web"); !errors.Is(err, ErrInUse) {
		t.Errorf("the name is free: %v", err)
	}
	if err := first.Release(); err != nil {
		t.Error(err)
	}
}

// TestAdoptRefuses: only the lock of the very name is taken.
func TestAdoptRefuses(t *testing.T) {
	r := newRegistry(t)
	for _, name := range []string{"web", "db"} {
		l, err := r.Acquire(name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Release() })
		if name == "web" {
			continue
		}
		for _, other := range []string{"web", "nobody", "../db"} {
			lock, err := l.Lock()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := r.Adopt(other, lock); err == nil {
				t.Errorf("the lock of db is taken for %s", other)
			}
		}
	}
}
