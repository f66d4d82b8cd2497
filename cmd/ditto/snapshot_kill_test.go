package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/labtest"
)

// TestSnapshotKilled kills a machine's process at random points of a save, every
// third time together with the command that saves it: there is a whole snapshot
// or none, the disk is sound and can be used again, and nothing is left that the
// next save does not remove.
func TestSnapshotKilled(t *testing.T) {
	kills := labtest.Count(5, 50)
	s := newSaveHome(t, "w", "64M", "size=48M,words=512,order=random,seed=6")
	began := time.Now()
	s.want("snapshot", "w", filepath.Join(s.dir, "first"), "--compress", "zstd")
	took := time.Since(began)
	s.finish("w")
	whole := 0
	for i := range kills {
		k := &kill{saveHome: s, snap: filepath.Join(s.dir, fmt.Sprint("snap", i)), top: filepath.Join(s.dir, fmt.Sprintf("disk.%d.qcow2", i))}
		s.want("image", "overlay", k.top, filepath.Join(s.dir, "disk.first.qcow2"))
		k.run("killed", "size=48M,words=512,order=random,seed=7")
		k.during(took, i%3 == 2)
		if k.check() {
			whole++
			k.snap += "-again"
		}
		k.usable()
	}
	t.Logf("%d whole, %d none", whole, kills-whole)
	if !t.Failed() {
		labtest.Proof(t, "snapshot-killed", "a machine's process killed at %d random points of a save: %d whole snapshots, %d times none; the disk's chain never corrupt and in use again each time, no debris behind the next save", kills, whole, kills-whole)
	}
}

// kill is one machine that is killed while it is saved.
type kill struct {
	*saveHome
	snap, top string // the snapshot, and the disk that the machine writes
}

func (k *kill) run(name, writes string) {
	k.t.Helper()
	k.want("run", "-d", "--name", name, "--kernel", "payload:memwriter:"+writes, "--net", "none", "--memory", "64M", "--disk", k.top)
}

// pid is the process of a machine.
func (s *saveHome) pid(name string) int {
	s.t.Helper()
	var rows []struct {
		Name string
		PID  int
	}
	if err := json.Unmarshal([]byte(s.want("ps", "--json")), &rows); err != nil {
		s.t.Fatal(err)
	}
	for _, r := range rows {
		if r.Name == name {
			return r.PID
		}
	}
	s.t.Fatalf("%s does not run", name)
	return 0
}

// during kills the machine, and its client if that is wanted, at a point of a
// save.
func (k *kill) during(took time.Duration, client bool) {
	k.t.Helper()
	pid := k.pid("killed")
	cmd := exec.Command(k.path, "snapshot", "killed", k.snap, "--compress", "zstd")
	cmd.Env = k.env
	if err := cmd.Start(); err != nil {
		k.t.Fatal(err)
	}
	time.Sleep(rand.N(took)) // any point will do
	if client {
		_ = cmd.Process.Kill()
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		k.t.Fatal(err)
	}
	_ = cmd.Wait() // it may have been done
	for deadline := time.Now().Add(time.Minute); unix.Kill(pid, 0) == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			k.t.Fatal("the machine does not die")
		}
	}
}

// check tells whether there is a snapshot, which must be whole, and leaves in top
// what the machine wrote last.
func (k *kill) check() (whole bool) {
	k.t.Helper()
	overlay := filepath.Join(k.dir, "disk."+filepath.Base(k.snap)+".qcow2")
	_, err := os.Lstat(k.snap)
	switch {
	case err == nil:
		k.want("snapshot", "verify", k.snap)
		if info, err := os.Stat(k.top); err != nil || info.Mode()&0o222 != 0 {
			k.t.Errorf("there is a snapshot, and its disk has mode %v, %v", info.Mode(), err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		k.t.Fatal(err)
	}
	below := k.top
	if _, err := os.Stat(overlay); err == nil {
		k.top = overlay
	}
	for _, image := range []string{below, k.top} {
		out, err := exec.Command("qemu-img", "check", image).CombinedOutput()
		var exit *exec.ExitError
		const leaks = 3 // clusters that nothing refers to
		if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != leaks) {
			k.t.Errorf("qemu-img check %s: %v: %s", image, err, out)
		}
	}
	return err == nil
}

// usable saves a machine on what is left, into the name of the snapshot if there
// is none.
func (k *kill) usable() {
	k.t.Helper()
	// A command that was killed between the two leaves a frozen disk without an
	// overlay.
	if info, err := os.Stat(k.top); err == nil && info.Mode()&0o200 == 0 {
		if err := os.Chmod(k.top, 0o600); err != nil {
			k.t.Fatal(err)
		}
	}
	k.run("next", "size=1M,words=16,order=random,seed=8")
	k.want("snapshot", "next", k.snap, "--stop")
	k.want("snapshot", "verify", k.snap)
	if left := k.left(); strings.Contains(left, "partial") {
		k.t.Errorf("left: %s", left)
	}
}

// TestSnapshotClientKilled kills and interrupts the command that saves a machine,
// at random points: the machine goes on and finds its memory right, there is a
// whole snapshot or none, and behind the next save nothing is left.
func TestSnapshotClientKilled(t *testing.T) {
	kills := labtest.Count(4, 50)
	s := newSaveHome(t, "w", "32M", "size=8M,words=512,order=random,seed=16")
	began := time.Now()
	s.want("snapshot", "w", filepath.Join(s.dir, "first"), "--compress", "zstd")
	took := time.Since(began)
	whole, how := 0, map[unix.Signal]int{}
	for i := range kills {
		snap := filepath.Join(s.dir, fmt.Sprint("snap", i))
		signal := []unix.Signal{unix.SIGKILL, unix.SIGINT, unix.SIGKILL, unix.SIGTERM}[i%4]
		how[signal]++
		cmd := exec.Command(s.path, "snapshot", "w", snap, "--compress", "zstd")
		cmd.Env = s.env
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(rand.N(took)) // any point will do
		if err := cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Fatal(err)
		}
		_ = cmd.Wait() // it may have been done
		if signal != unix.SIGKILL && strings.Contains(s.left(), "partial") {
			t.Errorf("%v left %s", signal, s.left())
		}
		if _, err := os.Lstat(snap); err == nil {
			whole++
			s.want("snapshot", "verify", snap)
			snap += "-next"
		} else if !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		s.nothingUnused(s.saveAgain(snap))
	}
	s.finish("w")
	if !t.Failed() {
		labtest.Proof(t, "snapshot-client-killed", "the command killed %d times and interrupted %d times at random points of a save: %d whole snapshots, %d times none; the machine goes on with right memory, and no overlay, folder or frozen disk is left that nothing needs", how[unix.SIGKILL], kills-how[unix.SIGKILL], whole, kills-whole)
	}
}

// saveAgain saves the machine once it has noticed that its client is gone, and
// returns what its disk is written to from then on.
func (s *saveHome) saveAgain(snap string) (disk string) {
	s.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		code, out, errs := s.do("snapshot", "w", snap, "--compress", "zstd", "--json")
		if code == 0 {
			s.want("snapshot", "verify", snap)
			lines := strings.Split(strings.TrimSpace(out), "\n")
			var event struct{ Disks []string }
			if err := json.Unmarshal([]byte(lines[len(lines)-1]), &event); err != nil || len(event.Disks) != 1 {
				s.t.Fatalf("%s: %v", out, err)
			}
			return event.Disks[0]
		}
		if !strings.Contains(errs, "under way") || time.Now().After(deadline) {
			s.t.Fatalf("code %d: %s", code, errs)
		}
	}
}

// nothingUnused makes sure that the work folder has snapshots and the images that
// the disk is made of, and that only the top one may be written.
func (s *saveHome) nothingUnused(disk string) {
	s.t.Helper()
	chain := map[string]bool{}
	for path := disk; path != ""; {
		chain[filepath.Base(path)] = true
		info, err := os.Stat(path)
		if err != nil {
			s.t.Fatal(err)
		}
		if writable := info.Mode()&0o200 != 0; writable != (path == disk) {
			s.t.Errorf("%s has mode %v; the machine writes %s", path, info.Mode(), disk)
		}
		var image struct {
			Backing string `json:"full-backing-filename"`
		}
		out, err := exec.Command("qemu-img", "info", "-U", "--output=json", path).Output()
		if err := errors.Join(err, json.Unmarshal(out, &image)); err != nil {
			s.t.Fatalf("qemu-img info %s: %v: %s", path, err, out)
		}
		path = image.Backing
	}
	for name := range strings.FieldsSeq(s.left()) {
		if !chain[name] && !strings.HasPrefix(name, "snap") && name != "first" {
			s.t.Errorf("nothing needs %s; the disk is made of %v", name, chain)
		}
	}
}
