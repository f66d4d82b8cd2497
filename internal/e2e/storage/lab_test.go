package storage

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/labtest"
)

// command is the ditto command, which the lab batch builds.
func command(t *testing.T) string {
	t.Helper()
	labtest.Need(t)
	dir := os.Getenv(labtest.EnvBin)
	if dir == "" {
		t.Skipf("%s is not set; try: go run ./cmd/ditto-lab test ./internal/e2e/storage", labtest.EnvBin)
	}
	return filepath.Join(dir, "ditto")
}

// guest is a running ditto.
type guest struct {
	t      *testing.T
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	cancel context.CancelFunc
	ended  chan struct{}

	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{} // signalled at every output
}

// startGuest starts ditto with arguments and a user's folders of its own.
func startGuest(t *testing.T, ditto string, args ...string) *guest {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), guestLimit)
	g := &guest{t: t, cancel: cancel, ended: make(chan struct{}), more: make(chan struct{}, 1)}
	g.cmd = exec.CommandContext(ctx, ditto, args...)
	g.cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+t.TempDir(), "XDG_STATE_HOME="+t.TempDir())
	g.cmd.Stdout, g.cmd.Stderr = g, g
	var err error
	if g.stdin, err = g.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(g.ended)
		_ = g.cmd.Wait() // the status is looked at
	}()
	t.Cleanup(func() { cancel(); <-g.ended })
	return g
}

// Write implements io.Writer for what the guest prints.
func (g *guest) Write(b []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case g.more <- struct{}{}:
	default:
	}
	return g.text.Write(b)
}

func (g *guest) String() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.text.String()
}

// waitFor returns when the console shows text.
func (g *guest) waitFor(text string) {
	g.t.Helper()
	for !strings.Contains(g.String(), text) {
		select {
		case <-g.more:
		case <-g.ended:
			if strings.Contains(g.String(), text) {
				return
			}
			g.t.Fatalf("ended with status %d before %q:\n%s", g.cmd.ProcessState.ExitCode(), text, g)
		}
	}
}

// goOn lets a guest that waits in a step go on.
func (g *guest) goOn() {
	g.t.Helper()
	if _, err := io.WriteString(g.stdin, "\r"); err != nil {
		g.t.Fatal(err)
	}
}

// done waits for the guest's end, which must be a good one.
func (g *guest) done() string {
	g.t.Helper()
	g.waitFor(jobDone)
	<-g.ended
	if code := g.cmd.ProcessState.ExitCode(); code != 0 {
		g.t.Fatalf("status %d:\n%s", code, g)
	}
	return g.String()
}

// TestLabDiskContent: what the guest writes through its file system is what
// qemu-img and the host's own ext4 read afterwards.
func TestLabDiskContent(t *testing.T) {
	ditto := command(t)
	dir := t.TempDir()
	images := newGuest(t, dir)
	size := int64(labtest.Count(32, 256)) << 20
	caches := []string{"writeback", "none"}
	var flags, paths []string
	for _, cache := range caches {
		path := filepath.Join(dir, cache)
		mkfs(t, path, size+128<<20, "")
		paths, flags = append(paths, path), append(flags, path+",cache="+cache)
	}
	job := map[string]string{"name": "content", "bytes": fmt.Sprint(size), "seed": "1", "disks": fmt.Sprint(len(caches))}
	out := startGuest(t, ditto, images.args(job, flags...)...).done()
	for i, path := range paths {
		t.Run(caches[i], func(t *testing.T) {
			// By qemu-img's eyes: a copy that compares equal.
			twin := path + ".copy"
			tool(t, nil, "qemu-img", "convert", "-f", "raw", "-O", "raw", path, twin)
			tool(t, nil, "qemu-img", "compare", "-f", "raw", "-F", "raw", path, twin)
			for _, image := range []string{path, twin} {
				tool(t, nil, "e2fsck", "-fn", image)
				sum := hostDigest(t, image)
				for _, who := range []string{"written", "read"} {
					if want := strings.TrimSpace(fmt.Sprintf(sumLine, who, sum)); !strings.Contains(out, want) {
						t.Errorf("the host reads %x from %s, which the guest has not %s:\n%s", sum, image, who, out)
					}
				}
			}
		})
	}
	labtest.Proof(t, "disk-content", "%d MiB through ext4, cache modes %s: equal SHA-256 in the guest, on the host, and of qemu-img's copy", size>>20, strings.Join(caches, " and "))
}

// hostDigest mounts an image, read-only, and reads the file in it.
func hostDigest(t *testing.T, image string) []byte {
	t.Helper()
	dir := t.TempDir()
	tool(t, nil, "mount", "-o", "loop,ro", image, dir)
	defer tool(t, nil, "umount", dir)
	sum, err := digest(filepath.Join(dir, contentFile))
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// allocated is the space a file takes, in bytes.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	// What is dirty has no space yet on a file system that allocates late.
	tool(t, nil, "sync", path)
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// TestLabErase: what a guest discards, trims or zeroes makes holes in the
// image, and what must keep its space keeps it.
func TestLabErase(t *testing.T) {
	ditto := command(t)
	images := newGuest(t, t.TempDir())
	const size = 64 << 20
	for _, cache := range []string{"writeback", "none"} {
		t.Run(cache, func(t *testing.T) {
			dir := t.TempDir()
			fs, raw := filepath.Join(dir, "fs"), filepath.Join(dir, "raw")
			mkfs(t, fs, 128<<20, "")
			sparse(t, raw, size)
			empty := allocated(t, fs)
			job := map[string]string{"name": "erase", "bytes": fmt.Sprint(size)}
			g := startGuest(t, ditto, images.args(job, fs+",cache="+cache, raw+",cache="+cache)...)
			for _, s := range []struct {
				step     string
				fs, raw  int64 // least space taken
				slackFS  int64 // and how much more may be
				slackRaw int64
			}{
				{"filled", size, size, 64 << 20, 1 << 20},
				{"discarded", 0, 0, empty + 4<<20, 1 << 20},
				{"punched", 0, 0, empty + 4<<20, 1 << 20},
				{"zeroed", 0, size, empty + 4<<20, 1 << 20},
			} {
				g.waitFor(eraseStep + s.step)
				for _, d := range []struct {
					path        string
					least, more int64
				}{{fs, s.fs, s.slackFS}, {raw, s.raw, s.slackRaw}} {
					if got := allocated(t, d.path); got < d.least || got > d.least+d.more {
						t.Errorf("%s: %s takes %d KiB, want %d to %d", s.step, filepath.Base(d.path), got>>10, d.least>>10, (d.least+d.more)>>10)
					}
				}
				g.goOn()
			}
			g.done()
			tool(t, nil, "e2fsck", "-fn", fs)
		})
	}
}

// exitDisk is the exit code of a disk that cannot be had.
const exitDisk = 7

// refused checks that ditto refuses a disk because it is locked.
func refused(t *testing.T, ditto string, args []string) {
	t.Helper()
	g := startGuest(t, ditto, args...)
	<-g.ended
	if code, out := g.cmd.ProcessState.ExitCode(), g.String(); code != exitDisk || !strings.Contains(out, "is in use") || strings.Count(out, "\n") != 1 {
		t.Errorf("a locked disk: status %d, want %d and one line: %s", code, exitDisk, out)
	}
}

// TestLabLocks: while a guest writes to a disk nobody else can have it, neither
// ditto nor QEMU's tools, and the other way round. One that is read only is
// shared.
func TestLabLocks(t *testing.T) {
	ditto := command(t)
	dir := t.TempDir()
	images := newGuest(t, dir)
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, append([]byte("the-shared-disk"), make([]byte, 1<<20-15)...), 0o644); err != nil {
		t.Fatal(err)
	}
	writable := images.args(map[string]string{"name": "hold"}, disk)
	readonly := images.args(map[string]string{"name": "hold"}, disk+",readonly")
	qemuIO := func(args ...string) (int, string) {
		return try(t, "qemu-io", append(args, "-f", "raw", "-c", "read 0 512", disk)...)
	}
	qemuRefused := func(t *testing.T, what string, code int, out string) {
		t.Helper()
		if code == 0 || !strings.Contains(out, "lock") {
			t.Errorf("%s on a locked disk: status %d: %s", what, code, out)
		}
	}

	t.Run("writer", func(t *testing.T) {
		g := startGuest(t, ditto, writable...)
		g.waitFor(eraseStep + "held")
		for _, want := range []string{"HEAD the-shared-disk", "WRITABLE"} {
			if !strings.Contains(g.String(), want) {
				t.Errorf("no %q:\n%s", want, g)
			}
		}
		refused(t, ditto, writable)
		refused(t, ditto, readonly)
		code, out := qemuIO()
		qemuRefused(t, "qemu-io", code, out)
		// Who reads without minding that somebody writes is let in, as QEMU does.
		if code, out := qemuIO("-r"); code != 0 {
			t.Errorf("qemu-io -r beside a writer: status %d: %s", code, out)
		}
		code, out = try(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", disk, disk+".copy")
		qemuRefused(t, "qemu-img convert", code, out)
		code, out = try(t, "qemu-img", "resize", "-f", "raw", disk, "2M")
		qemuRefused(t, "qemu-img resize", code, out)
		// Who insists may look.
		tool(t, nil, "qemu-img", "info", "-U", "-f", "raw", disk)
		g.goOn()
		g.done()
		tool(t, nil, "qemu-img", "convert", "-f", "raw", "-O", "raw", disk, disk+".copy")
	})
	t.Run("readers", func(t *testing.T) {
		one, two := startGuest(t, ditto, readonly...), startGuest(t, ditto, readonly...)
		for _, g := range []*guest{one, two} {
			g.waitFor(eraseStep + "held")
			for _, want := range []string{"HEAD the-shared-disk", "READONLY"} {
				if !strings.Contains(g.String(), want) {
					t.Errorf("no %q:\n%s", want, g)
				}
			}
		}
		refused(t, ditto, writable)
		if code, out := qemuIO("-r"); code != 0 {
			t.Errorf("qemu-io -r beside readers: status %d: %s", code, out)
		}
		code, out := qemuIO()
		qemuRefused(t, "qemu-io", code, out)
		for _, g := range []*guest{one, two} {
			g.goOn()
			g.done()
		}
	})
	t.Run("held by QEMU", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), guestLimit)
		defer cancel()
		holder := exec.CommandContext(ctx, "qemu-io", "-f", "raw", disk)
		in, err := holder.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := holder.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := holder.Start(); err != nil {
			t.Fatal(err)
		}
		// It answers when it has the disk.
		if _, err := io.WriteString(in, "length\n"); err != nil {
			t.Fatal(err)
		}
		var text strings.Builder
		for buf := make([]byte, 64); !strings.Contains(text.String(), "1 MiB"); {
			n, err := out.Read(buf)
			text.Write(buf[:n])
			if err != nil {
				t.Fatalf("qemu-io: %v: %s", err, text.String())
			}
		}
		refused(t, ditto, writable)
		refused(t, ditto, readonly)
		if err := in.Close(); err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, out) // until it has ended
		if err := holder.Wait(); err != nil {
			t.Fatal(err)
		}
	})
}
