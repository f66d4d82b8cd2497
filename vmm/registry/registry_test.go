package registry

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestMain lets the test binary be a machine's process: it takes a name, says
// so, and waits to be killed.
func TestMain(m *testing.M) {
	if name := os.Getenv("REGISTRY_TEST_HOLD"); name != "" {
		r, err := OpenAt(os.Getenv("REGISTRY_TEST_RUN"), os.Getenv("REGISTRY_TEST_STATE"))
		if err == nil {
			_, err = r.Acquire(name)
		}
		fmt.Println(err)
		_, _ = bufio.NewReader(os.Stdin).ReadByte()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func newRegistry(t *testing.T) *Registry {
	t.Helper()
	// Socket paths are short; a test's own folder may not be.
	dir, err := os.MkdirTemp("/tmp", "ditto-registry-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	r, err := OpenAt(filepath.Join(dir, "run"), filepath.Join(dir, "state"))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func names(vms []VM) []string {
	out := []string{}
	for _, vm := range vms {
		out = append(out, vm.Name)
	}
	return out
}

func TestAcquireRelease(t *testing.T) {
	r := newRegistry(t)
	web, err := r.Acquire("web")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Acquire("web"); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) || !strings.Contains(err.Error(), "ditto stop web") {
		t.Errorf("the name was given twice, or the error does not tell the pid and the cure: %v", err)
	}
	started := time.Unix(1, 0).UTC()
	if err := web.Publish(State{CPUs: 2, Memory: 4096, Kernel: "k", Started: started}); err != nil {
		t.Fatal(err)
	}
	first, err := r.Acquire("")
	if err != nil {
		t.Fatal(err)
	}
	second, err := r.Acquire("")
	if err != nil {
		t.Fatal(err)
	}
	vms, err := r.List()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"vm1", "vm2", "web"}, names(vms)); diff != "" {
		t.Error(diff)
	}
	want := VM{Dir: web.Dir, State: State{Name: "web", PID: os.Getpid(), CPUs: 2, Memory: 4096, Kernel: "k", Started: started, Log: r.LogPath("web")}}
	if diff := cmp.Diff(want, vms[2]); diff != "" {
		t.Error(diff)
	}
	for _, l := range []*Lease{web, first, second} {
		if err := l.Release(); err != nil {
			t.Error(err)
		}
		if err := l.Release(); err != nil {
			t.Errorf("second release: %v", err)
		}
	}
	left, err := os.ReadDir(r.RunDir())
	if err != nil || len(left) != 1 || left[0].Name() != rootLockName {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if _, err := r.Find("web"); !errors.Is(err, ErrNotRunning) {
		t.Errorf("found a machine that is gone: %v", err)
	}
	again, err := r.Acquire("web")
	if err != nil {
		t.Fatal(err)
	}
	_ = again.Release()
}

func TestNames(t *testing.T) {
	r := newRegistry(t)
	for _, name := range []string{"../x", ".lock", "a/b", "-a", strings.Repeat("a", 200)} {
		if _, err := r.Acquire(name); err == nil {
			t.Errorf("%q was accepted", name)
		}
		if _, err := r.Find(name); !errors.Is(err, ErrNotRunning) {
			t.Errorf("%q: %v", name, err)
		}
	}
	long, err := OpenAt(filepath.Join(t.TempDir(), strings.Repeat("d", 90)), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := long.Acquire("a"); err == nil || !strings.Contains(err.Error(), "XDG_RUNTIME_DIR") {
		t.Errorf("a socket path that cannot be bound: %v", err)
	}
}

// TestKilledMachine kills a machine's process without warning: it must be seen
// to be gone, waited for, and swept, whatever pid file it left.
func TestKilledMachine(t *testing.T) {
	r := newRegistry(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "REGISTRY_TEST_HOLD=doomed", "REGISTRY_TEST_RUN="+r.run, "REGISTRY_TEST_STATE="+r.state)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill() }()
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "<nil>\n" {
		t.Fatalf("%s, %v", line, err)
	}
	vm, err := r.Find("doomed")
	if err != nil || vm.PID != cmd.Process.Pid {
		t.Fatalf("%+v, %v", vm, err)
	}
	if _, err := r.Acquire("doomed"); !errors.Is(err, ErrInUse) {
		t.Errorf("name of a living process: %v", err)
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Wait(canceled, vm); !errors.Is(err, context.Canceled) {
		t.Errorf("wait for a living process: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- r.Wait(t.Context(), vm) }()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("wait: %v", err)
	}
	_ = cmd.Wait()
	// This process has the pid that the file names: it must not count.
	if err := os.WriteFile(filepath.Join(vm.Dir, pidName), []byte(fmt.Sprint(os.Getpid())), 0o600); err != nil {
		t.Fatal(err)
	}
	if vms, err := r.List(); err != nil || len(vms) != 0 {
		t.Errorf("still listed: %v, %v", vms, err)
	}
	if _, err := os.Stat(vm.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("not swept: %v", err)
	}
}

func TestStaleFolderWithoutLock(t *testing.T) {
	r := newRegistry(t)
	dir := filepath.Join(r.run, "stale")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, apiName), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := r.List(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("not swept: %v", err)
	}
}

// TestConcurrentAcquire lets many ask for one name while others sweep: exactly
// one may get it.
func TestConcurrentAcquire(t *testing.T) {
	r := newRegistry(t)
	for range 20 {
		var wg sync.WaitGroup
		leases := make(chan *Lease, 8)
		for range cap(leases) {
			wg.Go(func() {
				l, err := r.Acquire("one")
				switch {
				case err == nil:
					leases <- l
				case !errors.Is(err, ErrInUse):
					t.Error(err)
				}
			})
			wg.Go(func() {
				if _, err := r.List(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		close(leases)
		if len(leases) != 1 {
			t.Fatalf("%d owners of one name", len(leases))
		}
		_ = (<-leases).Release()
	}
}

func TestFindRunDir(t *testing.T) {
	uid := os.Getuid()
	mkdir := func(mode os.FileMode) string {
		dir := filepath.Join(t.TempDir(), "base")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	good, open, tmp := mkdir(0o700), mkdir(0o777), mkdir(0o777)
	if got, err := findRunDir(uid, []string{"", "/absent", open, good}, tmp); err != nil || got != filepath.Join(good, "ditto") {
		t.Errorf("%s, %v", got, err)
	}
	want := filepath.Join(tmp, fmt.Sprintf("ditto-%d", uid))
	if got, err := findRunDir(uid, []string{open}, tmp); err != nil || got != want {
		t.Errorf("%s, %v", got, err)
	}
	if err := os.Chmod(want, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := findRunDir(uid, nil, tmp); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Errorf("a folder that others can enter: %v", err)
	}
	if err := os.Remove(want); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(good, want); err != nil {
		t.Fatal(err)
	}
	if _, err := findRunDir(uid, nil, tmp); err == nil || !strings.Contains(err.Error(), "not a directory") {
		t.Errorf("a symlink planted by others: %v", err)
	}
	if err := ensurePrivate(good, uid+1); err == nil || !strings.Contains(err.Error(), "belongs to user") {
		t.Errorf("a folder of someone else: %v", err)
	}
}

func TestLog(t *testing.T) {
	r := newRegistry(t)
	l, err := r.Acquire("logged")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Release() }()
	read := func(suffix string) string {
		data, err := os.ReadFile(r.LogPath("logged") + suffix)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	f, err := l.OpenLog(10)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"aaaa", "bbbb", "cccc"} {
		if n, err := f.Write([]byte(s)); n != len(s) || err != nil {
			t.Errorf("%d, %v", n, err)
		}
	}
	if now, old := read(""), read(".1"); now != "cccc" || old != "aaaabbbb" {
		t.Errorf("log %q, before %q", now, old)
	}
	big := bytes.Repeat([]byte("d"), 100)
	if _, err := f.Write(big); err != nil {
		t.Error(err)
	}
	if now, old := read(""), read(".1"); now != string(big) || old != "cccc" {
		t.Errorf("log %q, before %q", now, old)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	f, err = l.OpenLog(10)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if now, old := read(""), read(".1"); now != "" || old != string(big) {
		t.Errorf("second run: log %q, before %q", now, old)
	}
	if diff := cmp.Diff([]string{"logged"}, r.Logged()); diff != "" {
		t.Error(diff)
	}
}

func TestExitRecord(t *testing.T) {
	r := newRegistry(t)
	if _, err := r.LastExit("x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a machine that never ran: %v", err)
	}
	l, err := r.Acquire("x")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Release() }()
	f, err := l.OpenExit()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := r.LastExit("x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a machine that still runs: %v", err)
	}
	want := ExitRecord{Time: time.Unix(2, 0).UTC(), Reason: "poweroff", Code: 3, Error: "e"}
	if err := WriteExit(f, want); err != nil {
		t.Fatal(err)
	}
	got, err := r.LastExit("x")
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Error(err, diff)
	}
}
