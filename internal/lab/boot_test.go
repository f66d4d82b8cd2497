package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"ditto.vm/internal/labtest"
)

// startLab boots a lab and checks, when it is closed, that nothing is left.
func startLab(t *testing.T, o Options) *Lab {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	l, err := Start(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(l.tmp.path); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", l.tmp.path, err)
		}
		select {
		case <-l.Done():
		default:
			t.Error("QEMU is still running")
		}
	})
	return l
}

func TestBoot(t *testing.T) {
	labtest.NeedBoot(t)
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	t.Run("lab", func(t *testing.T) {
		l := startLab(t, Options{MemoryMiB: 4096})
		for _, tc := range []struct {
			name string
			fn   func(*testing.T, *Lab)
		}{
			{"host", testHost},
			{"status", testStatus},
			{"streams", testStreams},
			{"concurrent", testConcurrent},
			{"cancel", testCancel},
			{"terminal", testTerminal},
			{"rebuilt", testRebuilt},
			{"survivors", testSurvivors},
		} {
			t.Run(tc.name, func(t *testing.T) { tc.fn(t, l) })
		}
	})
}

// output runs a shell script that must succeed.
func output(t *testing.T, l *Lab, script string) string {
	t.Helper()
	out, err := l.Output(t.Context(), "sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// testHost looks for what the recipe promises.
func testHost(t *testing.T, l *Lab) {
	for script, want := range map[string]string{
		"cat /sys/module/kvm_amd/parameters/npt":                                   "Y",
		"test -c /dev/kvm && echo yes":                                             "yes",
		"stat -f -c %T /lab":                                                       "ext2/ext3",
		"cat /sys/fs/cgroup/cgroup.controllers | grep -o memory":                   "memory",
		"grep -o 'madvise\\]' /sys/kernel/mm/transparent_hugepage/enabled":         "madvise]",
		"cat /sys/devices/system/clocksource/clocksource0/current_clocksource":     "tsc",
		"modprobe zram && modprobe sch_netem && modprobe dm-flakey && echo loaded": "loaded",
		"ip link add v0 type veth peer name v1 && ip -br link show lo | cut -c1-2": "lo",
		"echo $DITTO_LAB": "1",
		"touch /usr/bin/only-here && test -e /usr/bin/only-here && echo written": "written",
		"f=$(mktemp) && losetup -f >/dev/null && rm $f && echo loop":             "loop",
		"exec 3<>/dev/net/tun && echo tun":                                       "tun",
		"ls -d /sys/kernel/debug/kvm":                                            "/sys/kernel/debug/kvm",
		"ls /dev/pts/ptmx /dev/shm >/dev/null && echo present":                   "present",
		"pwd": mustGetwd(t),
	} {
		if got := output(t, l, script); got != want {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
	if _, err := os.Stat("/usr/bin/only-here"); err == nil {
		t.Fatal("the lab wrote to this machine")
	}
}

func mustGetwd(t *testing.T) string {
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func testStatus(t *testing.T, l *Lab) {
	for script, want := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -9 $$": 137, "kill $$": 143} {
		code, err := l.Run(t.Context(), &Cmd{Args: []string{"sh", "-c", script}})
		if err != nil || code != want {
			t.Errorf("%s: %d, %v; want %d", script, code, err, want)
		}
	}
	if code, err := l.Run(t.Context(), &Cmd{Args: []string{"/no/such/program"}}); err == nil {
		t.Errorf("a missing program: %d, no error", code)
	}
	if code, err := l.Run(t.Context(), &Cmd{Args: []string{"no-such-program"}}); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("a program that is not in PATH: %d, %v", code, err)
	}
}

// testStreams sends bytes through a command and compares.
func testStreams(t *testing.T, l *Lab) {
	in := make([]byte, 5<<20)
	if _, err := io.ReadFull(rand.NewChaCha8([32]byte{1}), in); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	code, err := l.Run(t.Context(), &Cmd{
		Args:  []string{"sh", "-c", "echo to stderr >&2; exec cat"},
		Stdin: bytes.NewReader(in), Stdout: &out, Stderr: &errs,
	})
	if err != nil || code != 0 {
		t.Fatalf("cat: %d, %v", code, err)
	}
	if sha256.Sum256(out.Bytes()) != sha256.Sum256(in) {
		t.Errorf("%d bytes came back of %d, or others", out.Len(), len(in))
	}
	if errs.String() != "to stderr\n" {
		t.Errorf("stderr: %q", errs.String())
	}
	// A command that ends without reading its input must not hold anything up.
	if code, err := l.Run(t.Context(), &Cmd{Args: []string{"true"}, Stdin: bytes.NewReader(in)}); err != nil || code != 0 {
		t.Errorf("true: %d, %v", code, err)
	}
}

func testConcurrent(t *testing.T, l *Lab) {
	var wg sync.WaitGroup
	for i := range 2 * MaxRuns {
		wg.Go(func() {
			var out bytes.Buffer
			code, err := l.Run(t.Context(), &Cmd{Args: []string{"sh", "-c", fmt.Sprintf("echo %d; exit %d", i, i)}, Stdout: &out})
			if err != nil || code != i || out.String() != fmt.Sprintf("%d\n", i) {
				t.Errorf("run %d: %d, %v, %q", i, code, err, out.String())
			}
		})
	}
	wg.Wait()
}

// testCancel ends a command that ignores polite signals, with its children.
func testCancel(t *testing.T, l *Lab) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, w := io.Pipe()
	go func() {
		buf := make([]byte, 16)
		_, _ = r.Read(buf)
		cancel()
		_, _ = io.Copy(io.Discard, r)
	}()
	script := "trap '' TERM INT; setsid sleep 4242 & echo ready; while :; do sleep 1; done"
	_, err := l.Run(ctx, &Cmd{Args: []string{"sh", "-c", script}, Stdout: w})
	_ = w.Close()
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("a cancelled command: %v", err)
	}
	if got := output(t, l, "pgrep -f 'sleep 424[2]' || echo none"); got != "none" {
		t.Errorf("a child of the cancelled command lives: %s", got)
	}
}

func testTerminal(t *testing.T, l *Lab) {
	var out bytes.Buffer
	code, err := l.Run(t.Context(), &Cmd{
		Args: []string{"sh", "-c", "test -t 0 && test -t 1 && stty size </dev/tty"}, Stdout: &out,
		Terminal: &Terminal{Rows: 33, Cols: 99},
	})
	if err != nil || code != 0 || strings.TrimSpace(out.String()) != "33 99" {
		t.Errorf("stty: %d, %v, %q", code, err, out.String())
	}
}

// testRebuilt runs a program, changes it as a build does, and runs it again.
func testRebuilt(t *testing.T, l *Lab) {
	prog := filepath.Join(t.TempDir(), "prog")
	for i := range 3 {
		text := fmt.Sprintf("#!/bin/sh\necho build %d\n", i)
		if err := os.WriteFile(prog+".new", []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(prog+".new", prog); err != nil {
			t.Fatal(err)
		}
		out, err := l.Output(t.Context(), prog)
		if want := fmt.Sprintf("build %d\n", i); err != nil || string(out) != want {
			t.Errorf("run %d: %q, %v; want %q", i, out, err, want)
		}
	}
	// What the lab writes to the share arrives here at once, and back.
	output(t, l, "echo from inside > "+ShareDir+"/note")
	if b, err := os.ReadFile(filepath.Join(l.ShareDir(), "note")); err != nil || string(b) != "from inside\n" {
		t.Errorf("the share: %q, %v", b, err)
	}
	if err := os.WriteFile(filepath.Join(l.ShareDir(), "note"), []byte("from outside, and longer\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := output(t, l, "cat "+ShareDir+"/note"); got != "from outside, and longer" {
		t.Errorf("the lab reads %q from the share", got)
	}
}

// testSurvivors leaves a process behind that holds the output open.
func testSurvivors(t *testing.T, l *Lab) {
	if got := output(t, l, "sleep 4343 & echo started"); got != "started" {
		t.Errorf("output %q", got)
	}
	if got := output(t, l, "pkill -f 'sleep 434[3]' && echo killed"); got != "killed" {
		t.Errorf("the process did not survive: %q", got)
	}
}

// TestBootPowerCut shows what a power cut keeps: what was flushed is there,
// what lay in the lab's page cache is not.
func TestBootPowerCut(t *testing.T) {
	labtest.NeedBoot(t)
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	l := startLab(t, Options{MemoryMiB: 2048, Disks: []string{disk}})
	// The last close of a block device writes it back: keep it open.
	output(t, l, "sleep 1000 <>/dev/lab/disk0 >/dev/null 2>&1 &")
	output(t, l, "echo flushed | dd of=/dev/lab/disk0 conv=fsync,notrunc status=none")
	output(t, l, "echo forgotten | dd of=/dev/lab/disk0 seek=8 conv=notrunc status=none")

	running := make(chan error, 1)
	go func() {
		_, err := l.Run(t.Context(), &Cmd{Args: []string{"sleep", "1000"}})
		running <- err
	}()
	l.Kill()
	if err := <-running; !errors.Is(err, ErrDead) {
		t.Errorf("the command in progress: %v, want ErrDead", err)
	}
	if _, err := l.Run(t.Context(), &Cmd{Args: []string{"true"}}); !errors.Is(err, ErrDead) {
		t.Errorf("a command after the cut: %v, want ErrDead", err)
	}
	b, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(b, []byte("flushed\n")) {
		t.Error("what had been flushed is lost")
	}
	if bytes.Contains(b, []byte("forgotten")) {
		t.Error("what had not been flushed is there: the lab writes through, so that a missing flush cannot be seen")
	}
}

// TestBootCloseUnmounts shows that an orderly end leaves the caller's disks
// clean.
func TestBootCloseUnmounts(t *testing.T) {
	labtest.NeedBoot(t)
	disk := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(disk)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(64<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	l := startLab(t, Options{MemoryMiB: 2048, Disks: []string{disk}})
	output(t, l, "mkfs.ext4 -q /dev/lab/disk0 && mkdir /m && mount /dev/lab/disk0 /m && echo kept > /m/file")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	// Superblock at 1024: s_magic at 0x38, s_state at 0x3a, where 1 is clean;
	// s_feature_incompat at 0x60, where 4 is a journal to be replayed.
	sb := b[1024:]
	if sb[0x38] != 0x53 || sb[0x3a] != 1 || sb[0x60]&4 != 0 {
		t.Errorf("the file system is not clean: state %d, incompat %#x", sb[0x3a], sb[0x60])
	}
	if !bytes.Contains(b, []byte("kept\n")) {
		t.Error("the file is not on the disk")
	}
}

func TestBootFailureShowsConsole(t *testing.T) {
	labtest.NeedBoot(t)
	l, err := Start(t.Context(), Options{MemoryMiB: 1024, Append: "rdinit=/nothing init=/nothing root=/dev/nothing"})
	if err == nil {
		_ = l.Close()
		t.Fatal("a kernel without init is up")
	}
	if !errors.Is(err, ErrDead) || !strings.Contains(err.Error(), "Kernel panic") {
		t.Errorf("the error does not say why: %v", err)
	}
}
