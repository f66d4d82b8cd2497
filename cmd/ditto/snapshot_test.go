package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// saveHome is a home with a machine that writes memory and can tell whether it
// still is what it wrote.
type saveHome struct {
	*home
	dir  string
	disk string
}

func newSaveHome(t *testing.T, name, memory, writes string) *saveHome {
	t.Helper()
	requireKVM(t)
	h := newHome(t)
	s := &saveHome{home: h, dir: filepath.Join(filepath.Dir(h.runDir), "work")}
	s.env = append(s.env, "XDG_DATA_HOME="+filepath.Join(filepath.Dir(h.runDir), "data"))
	s.disk = filepath.Join(s.dir, "disk.img")
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.disk, bytes.Repeat([]byte("on the disk "), 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(s.disk, 1<<20); err != nil {
		t.Fatal(err)
	}
	s.want("run", "-d", "--name", name, "--kernel", "payload:memwriter:"+writes, "--net", "none", "--memory", memory, "--disk", s.disk)
	return s
}

// want runs ditto, which must work.
func (s *saveHome) want(args ...string) string {
	s.t.Helper()
	code, out, errs := s.do(args...)
	if code != 0 || errs != "" {
		s.t.Fatalf("ditto %s: code %d: %s%s", strings.Join(args, " "), code, out, errs)
	}
	return out
}

// console joins a machine's console.
func (s *saveHome) console(name string) net.Conn {
	s.t.Helper()
	c, err := net.Dial("unix", filepath.Join(s.runDir, "ditto", name, "console.sock"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		s.t.Fatal(err)
	}
	return c
}

// writes asks a machine how much it has written.
func (s *saveHome) writes(name string) (n uint64) {
	s.t.Helper()
	const report = "memwriter writes="
	before := strings.Count(s.log(name), report)
	if _, err := s.console(name).Write([]byte("s")); err != nil {
		s.t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		log := s.log(name)
		last := log[strings.LastIndex(log, report)+1:]
		if strings.Count(log, report) > before && strings.Contains(last, "\n") {
			if _, err := fmt.Sscanf(last, report[1:]+"%x", &n); err != nil {
				s.t.Fatalf("%s: %q: %v", name, last, err)
			}
			return n
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("%s does not answer: %s", name, log)
		}
	}
}

func (s *saveHome) log(name string) string {
	s.t.Helper()
	data, err := os.ReadFile(filepath.Join(s.state, "ditto", name, "console.log"))
	if err != nil {
		s.t.Fatal(err)
	}
	return string(data)
}

// finish lets a machine check its memory and end.
func (s *saveHome) finish(name string) {
	s.t.Helper()
	c := s.console(name)
	if _, err := c.Write([]byte("q")); err != nil {
		s.t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, c)
	var record struct {
		Reason, Error string
		Code          int
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(s.runDir, "ditto", name)); os.IsNotExist(err) {
			break
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("%s does not end", name)
		}
	}
	data, err := os.ReadFile(filepath.Join(s.state, "ditto", name, "exit.json"))
	if err == nil {
		err = json.Unmarshal(data, &record)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	if record.Reason != "status" || record.Code != 0 {
		s.t.Errorf("%s: its memory is not what it wrote, or it did not end well: %+v\n%s", name, record, s.log(name))
	}
}

// left lists the work folder.
func (s *saveHome) left() string {
	s.t.Helper()
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		s.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

// TestSnapshotRestoreClone saves a machine while it runs, sandbox and all, and
// lets it go on in place, restored, and as clones.
func TestSnapshotRestoreClone(t *testing.T) {
	s := newSaveHome(t, "w", "32M", "size=8M,words=16,order=random,seed=3")
	first, second := filepath.Join(s.dir, "first"), filepath.Join(s.dir, "second")
	s.want("snapshot", "w", first)
	if s.left() != "disk.first.qcow2 disk.img first" {
		t.Errorf("left: %s", s.left())
	}
	atFirst := s.writes("w")
	var event struct {
		Event       string
		StoredBytes uint64 `json:"stored_bytes"`
		Disks       []string
	}
	lines := strings.Split(strings.TrimSpace(s.want("snapshot", "w", second, "--parent", first, "--json")), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &event); err != nil || event.Event != "saved" || event.StoredBytes == 0 ||
		len(event.Disks) != 1 || event.Disks[0] != filepath.Join(s.dir, "disk.second.qcow2") {
		t.Errorf("%+v, %v", event, err)
	}
	if code, _, errs := s.do("snapshot", "w", second); code != 17 || !strings.Contains(errs, "exists already") {
		t.Errorf("code %d: %s", code, errs)
	}
	if code, _, errs := s.do("run", "--kernel", "payload:hello", "--net", "none", "--disk", s.disk); code != 7 {
		t.Errorf("a frozen disk is written: code %d: %s", code, errs)
	}

	// The machine that was saved and the one that is restored run side by side.
	if out := s.want("restore", first, "--name", "again", "-d"); out != "again\n" {
		t.Errorf("%q", out)
	}
	if now := s.writes("again"); now == 0 {
		t.Error("the restored guest does not know what it wrote")
	}
	if code, _, errs := s.do("restore", first); code != 9 || !strings.Contains(errs, "choose another name") {
		t.Errorf("code %d: %s", code, errs)
	}
	s.finish("w")
	s.finish("again")
	if _, err := os.Stat(filepath.Join(filepath.Dir(s.dir), "data/ditto/again/blk0.qcow2")); err != nil {
		t.Errorf("the overlay of a restored machine is gone: %v", err)
	}

	// In the foreground, with the console on standard output.
	s.restoreHere(second, "here")

	var rows []struct {
		Name, Error string
		PID         int
		Disks       []string
	}
	overlays := filepath.Join(s.dir, "overlays")
	if err := json.Unmarshal([]byte(s.want("clone", second, "-n", "3", "--name", "c", "--json", "--overlay-dir", overlays)), &rows); err != nil || len(rows) != 3 {
		t.Fatalf("%+v, %v", rows, err)
	}
	s.want("clone", second, "--name", "kept", "--keep", "--overlay-dir", overlays)
	for i, row := range rows {
		if row.Name != fmt.Sprintf("c-%d", i+1) || row.PID == 0 || row.Error != "" || row.Disks != nil {
			t.Errorf("%+v", row)
		}
	}
	if code, _, errs := s.do("snapshot", "c-1", filepath.Join(s.dir, "third")); code != 17 || !strings.Contains(errs, "--keep") {
		t.Errorf("a clone whose disk goes with it is saved: code %d: %s", code, errs)
	}
	s.want("snapshot", "kept-1", filepath.Join(s.dir, "third"))
	// The names that are taken are left out.
	s.want("clone", second, "--name", "c", "--overlay-dir", overlays)
	for _, name := range []string{"c-1", "c-2", "c-3", "c-4", "kept-1"} {
		if s.writes(name) < atFirst {
			t.Errorf("%s does not go on", name)
		}
		s.finish(name)
	}
	if entries, err := os.ReadDir(overlays); err != nil || len(entries) != 1 || entries[0].Name() != "kept-1" {
		t.Errorf("overlays that are left: %v, %v", entries, err)
	}
	s.nothingLeft()
}

// restoreHere restores a machine in the foreground and lets it check its memory.
func (s *saveHome) restoreHere(snap, name string) {
	s.t.Helper()
	cmd := exec.CommandContext(s.t.Context(), s.path, "restore", snap, "--name", name)
	cmd.Env = s.env
	cmd.Stdin = strings.NewReader("q")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "errors=0000000000000000") {
		s.t.Errorf("%v: %s", err, out)
	}
}

// TestSnapshotStop ends the machine with the save; it can be saved once more
// after each restore.
func TestSnapshotStop(t *testing.T) {
	s := newSaveHome(t, "w", "32M", "size=8M,words=16,order=random,seed=4")
	for i := range 3 {
		snap := filepath.Join(s.dir, fmt.Sprint("snap", i))
		s.want("snapshot", "w", snap, "--stop", "--compress", []string{"none", "zstd"}[i%2])
		if out := s.want("ps", "-q"); out != "" {
			t.Fatalf("it still runs: %s", out)
		}
		s.want("restore", snap, "-d")
	}
	s.finish("w")
	s.nothingLeft()
	// Whoever writes the disk after all spoils the snapshot, and is told.
	if err := os.Chmod(s.disk, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := s.do("restore", filepath.Join(s.dir, "snap0")); code != 17 || !strings.Contains(errs, "disk.img was written since") {
		t.Errorf("code %d: %s", code, errs)
	}
	s.nothingLeft()
}

// TestSnapshotInterrupted: however a save is interrupted, the machine goes on and
// nothing is left that the next save does not remove.
func TestSnapshotInterrupted(t *testing.T) {
	s := newSaveHome(t, "w", "256M", "size=200M,words=512,order=random,seed=5")
	defer s.finish("w")
	for _, signal := range []unix.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGKILL} {
		cmd := exec.Command(s.path, "snapshot", "w", filepath.Join(s.dir, "snap"), "--json", "--compress", "zstd")
		cmd.Env = s.env
		var errs bytes.Buffer
		cmd.Stderr = &errs
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		events := bufio.NewScanner(out)
		if !events.Scan() {
			t.Fatalf("no event: %s", &errs)
		}
		if err := cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		for events.Scan() {
		}
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) {
			t.Fatalf("%v was too late: %v", signal, err)
		}
		if signal == unix.SIGKILL {
			break
		}
		if exit.ExitCode() != 1 || errs.String() != "ditto: interrupted\n" || s.left() != "disk.img" {
			t.Errorf("%v: code %d: %s; left: %s", signal, exit.ExitCode(), &errs, s.left())
		}
		if info, err := os.Stat(s.disk); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%v: the disk has mode %v, %v", signal, info.Mode(), err)
		}
	}
	before := s.writes("w")
	for deadline := time.Now().Add(time.Minute); s.writes("w") == before; {
		if time.Now().After(deadline) {
			t.Fatal("the machine does not go on")
		}
	}
	// The machine notices that its client was killed, and can be saved again.
	for deadline := time.Now().Add(time.Minute); ; {
		code, _, errs := s.do("snapshot", "w", filepath.Join(s.dir, "snap"), "--compress", "zstd")
		if code == 0 {
			break
		}
		if !strings.Contains(errs, "under way") || time.Now().After(deadline) {
			t.Fatalf("code %d: %s", code, errs)
		}
	}
	if left := s.left(); strings.Contains(left, "partial") {
		t.Errorf("left: %s", left)
	}
}
