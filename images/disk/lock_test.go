package disk

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

func TestLock(t *testing.T) {
	reader, writer := Options{ReadOnly: true}, Options{}
	for _, c := range []struct {
		name          string
		first, second Options
		allowed       bool
	}{
		{"two readers", reader, reader, true},
		{"reader then writer", reader, writer, false},
		{"writer then reader", writer, reader, false},
		{"two writers", writer, writer, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := makeDisk(t, 1<<20)
			first, err := Open(path, c.first)
			if err != nil {
				t.Fatal(err)
			}
			second, err := Open(path, c.second)
			if err == nil {
				_ = second.Close()
			}
			if allowed := err == nil; allowed != c.allowed {
				t.Errorf("second opener: %v", err)
			}
			if !c.allowed && !errors.Is(err, ErrLocked) {
				t.Errorf("error %v is not ErrLocked", err)
			}
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			open(t, path, c.second) // the lock ended with the file
		})
	}
}

// TestLockEndsWithQueues opens again at once what had a queue.
func TestLockEndsWithQueues(t *testing.T) {
	path := makeDisk(t, 1<<20)
	for range 20 {
		r, err := Open(path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		q, err := r.NewQueue(testDepth)
		if err != nil {
			t.Fatal(err)
		}
		q.Write(0, [][]byte{make([]byte, 512)}, 0, true)
		if err := errors.Join(one(q), q.Close(), r.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// qemu returns the path of a QEMU tool or skips the test.
func qemu(t *testing.T, tool string) string {
	t.Helper()
	path, err := exec.LookPath(tool)
	if err != nil {
		t.Skipf("no %s: try apt-get install qemu-utils", tool)
	}
	return path
}

// TestLockExcludesQEMU holds the lock and lets qemu-io try. QEMU's tools share
// everything when they read a raw image, so they may read beside a writer.
func TestLockExcludesQEMU(t *testing.T) {
	qemuIO := qemu(t, "qemu-io")
	for _, c := range []struct {
		name    string
		ours    Options
		args    []string
		allowed bool
	}{
		{"our writer, their writer", Options{}, []string{"-c", "write 0 512"}, false},
		{"our writer, their reader", Options{}, []string{"-r", "-c", "read 0 512"}, true},
		{"our reader, their writer", Options{ReadOnly: true}, []string{"-c", "write 0 512"}, false},
		{"our reader, their reader", Options{ReadOnly: true}, []string{"-r", "-c", "read 0 512"}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := makeDisk(t, 1<<20)
			r, err := Open(path, c.ours)
			if err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command(qemuIO, append([]string{"-f", "raw", path}, c.args...)...).CombinedOutput()
			if allowed := err == nil; allowed != c.allowed {
				t.Errorf("qemu-io: %v: %s", err, out)
			}
			if !c.allowed && !bytes.Contains(out, []byte("lock")) {
				t.Errorf("qemu-io fails, but not for the lock: %s", out)
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(qemuIO, append([]string{"-f", "raw", path}, c.args...)...).CombinedOutput(); err != nil {
				t.Errorf("qemu-io after the lock was given up: %v: %s", err, out)
			}
		})
	}
}

// TestLockExcludedByQEMU lets qemu-io hold the lock and tries.
func TestLockExcludedByQEMU(t *testing.T) {
	qemuIO := qemu(t, "qemu-io")
	for _, c := range []struct {
		name    string
		theirs  []string
		ours    Options
		allowed bool
	}{
		{"their writer, our writer", nil, Options{}, false},
		{"their writer, our reader", nil, Options{ReadOnly: true}, false},
		{"their sharing reader, our writer", []string{"-r"}, Options{}, true},
		{"their reader, our reader", []string{"-r"}, Options{ReadOnly: true}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := makeDisk(t, 1<<20)
			end := holdWithQEMU(t, qemuIO, append([]string{"-f", "raw", path}, c.theirs...))
			r, err := Open(path, c.ours)
			if allowed := err == nil; allowed != c.allowed {
				t.Errorf("while QEMU has it: %v", err)
			}
			if err == nil {
				_ = r.Close()
			} else if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "qemu-io") {
				t.Errorf("error %q does not say who holds the lock", err)
			} else if strings.Contains(err.Error(), fmt.Sprintf("process %d ", os.Getpid())) {
				t.Errorf("error %q counts the process that asks among the holders", err)
			}
			end()
			open(t, path, c.ours)
		})
	}
}

// holdWithQEMU starts qemu-io and returns when it has opened the image. The
// function that it returns ends it.
func holdWithQEMU(t *testing.T, qemuIO string, args []string) (end func()) {
	t.Helper()
	cmd := exec.Command(qemuIO, args...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	// Its prompt comes after it opened the image.
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var seen []byte
	buf := make([]byte, 256)
	for !bytes.Contains(seen, []byte("qemu-io>")) {
		n, err := out.Read(buf)
		if err != nil {
			t.Fatalf("qemu-io: %v: %s", err, seen)
		}
		seen = append(seen, buf[:n]...)
	}
	return func() {
		if err := errors.Join(in.Close(), cmd.Wait()); err != nil {
			t.Errorf("qemu-io: %v", err)
		}
	}
}
