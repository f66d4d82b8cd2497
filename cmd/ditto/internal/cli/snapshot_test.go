package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/vmproc"
	"ditto.vm/images/chain"
	"ditto.vm/memory"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/savehost"
)

// writeSnapshot is a save of a machine whose memory holds nothing.
func writeSnapshot(ctx context.Context, m *fakeMachine, host vmm.SaveHost, o vmm.SaveOptions) (r vmm.SaveReport, err error) {
	o.Progress(vmm.SaveProgress{Phase: vmm.SaveMemory, Done: 1 << 20, Total: 1 << 20})
	space, err := memory.New(memory.Config{Size: 1 << 20})
	if err != nil {
		return r, err
	}
	defer space.Close()
	text, err := json.Marshal(m.cfg)
	if err != nil {
		return r, err
	}
	w, err := snapshot.Create(host, snapshot.Options{Space: space, Config: text, Compression: o.Compression})
	if err != nil {
		return r, err
	}
	if err := w.Capture(ctx, snapshot.Capture{}); err != nil {
		return r, err
	}
	if r.ID, err = w.Commit(ctx, nil); err != nil {
		return r, err
	}
	if o.Stop {
		m.end <- vmproc.Exit{Reason: "killed"}
	}
	r.Pause, r.Took, r.Stored, r.Rounds = 3100*time.Microsecond, time.Second, 4096, 2
	r.Overlays = []string{"", "/disks/b.snap.qcow2"}
	return r, nil
}

func TestSnapshot(t *testing.T) {
	h := newHost(t)
	h.save = writeSnapshot
	a := h.start("a", "--memory", "1M")
	dir := t.TempDir()
	first := filepath.Join(dir, "first")
	want := first + ": 4KiB of 1MiB stored, in 1s; a stood still for 3.1ms\ndisk 1 is frozen; it goes on in /disks/b.snap.qcow2\n"
	if out := h.want("snapshot", "a", first); out != want {
		t.Errorf("%q", out)
	}
	if s, err := snapshot.Open(first, snapshot.OpenOptions{}); err != nil || s.Close() != nil {
		t.Errorf("%v", err)
	}
	lines := strings.Split(strings.TrimSpace(h.want("snapshot", "a", filepath.Join(dir, "second"), "--json", "--compress", "zstd")), "\n")
	var events []map[string]any
	for _, line := range lines {
		var e map[string]any
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Errorf("%s: %v", line, err)
		}
		events = append(events, e)
	}
	progress := map[string]any{"event": "progress", "phase": "memory", "done_bytes": float64(1 << 20), "total_bytes": float64(1 << 20)}
	if len(events) != 2 || !cmp.Equal(events[0], progress) {
		t.Fatalf("%v", events)
	}
	for key, want := range map[string]any{
		"event": "saved", "name": "a", "path": filepath.Join(dir, "second"), "pause_ms": 3.1, "took_ms": 1000.0, "stored_bytes": 4096.0, "rounds": 2.0,
	} {
		if events[1][key] != want {
			t.Errorf("%s: %v, want %v", key, events[1][key], want)
		}
	}
	if out := h.want("snapshot", "a", filepath.Join(dir, "last"), "--stop"); !strings.Contains(out, "; a has ended\n") {
		t.Errorf("%q", out)
	}
	if code := <-a; code != exit.OK {
		t.Errorf("saved and stopped: code %d", code)
	}
}

// TestSnapshotOptions: flags arrive at the machine, a parent by its place.
func TestSnapshotOptions(t *testing.T) {
	h := newHost(t)
	h.save = writeSnapshot
	done := h.start("a", "--memory", "1M")
	dir, elsewhere := t.TempDir(), t.TempDir()
	h.want("snapshot", "a", filepath.Join(dir, "parent"))
	var got vmm.SaveOptions
	h.want("kill", "a")
	<-done
	h.save = func(_ context.Context, _ *fakeMachine, host vmm.SaveHost, o vmm.SaveOptions) (vmm.SaveReport, error) {
		got = o
		got.Progress = nil
		f, err := host.OpenSnapshotFile(o.Parent, snapshot.ManifestName)
		if err == nil {
			_ = f.Close()
		}
		return vmm.SaveReport{}, errors.Join(err, host.Abort())
	}
	done = h.start("a", "--memory", "1M")
	parent := filepath.Join(dir, "parent")
	for _, test := range []struct {
		in   string
		path string
	}{{filepath.Join(dir, "child"), "../parent"}, {filepath.Join(elsewhere, "child"), parent}} {
		h.want("snapshot", "a", test.in, "--parent", parent, "--paused")
		want := vmm.SaveOptions{Parent: parent, ParentPath: test.path, Compression: snapshot.None, Paused: true}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	h.want("kill", "a")
	<-done
}

// TestSnapshotFails: each failure has its code and a cure, and leaves nothing.
func TestSnapshotFails(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"taken", "empty"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	fails := func(err error) fakeSave {
		return func(_ context.Context, _ *fakeMachine, host vmm.SaveHost, _ vmm.SaveOptions) (vmm.SaveReport, error) {
			f, e := host.Create("pages")
			return vmm.SaveReport{}, errors.Join(err, e, f.Close(), host.Abort())
		}
	}
	for _, test := range []struct {
		save fakeSave
		args []string
		code int
		want string
	}{
		{nil, []string{"gone", "new"}, exit.NotFound, `no machine "gone" is running (running: a)`},
		{nil, []string{"a"}, exit.Usage, "accepts 2 arg"},
		{nil, []string{"a", "new", "--compress", "lz4"}, exit.Usage, "use none or zstd"},
		{nil, []string{"a", "taken"}, exit.Snapshot, "it exists already: choose another folder"},
		{nil, []string{"a", "absent/new"}, exit.Snapshot, "make the folder that it is to be in"},
		{nil, []string{"a", "new", "--parent", "absent"}, exit.Snapshot, "absent"},
		{nil, []string{"a", "new", "--parent", "empty"}, exit.Snapshot, "not an intact snapshot"},
		{fails(snapshot.ErrBusy), []string{"a", "new"}, exit.Snapshot, "a is not saved: another save into it is under way: wait"},
		{fails(fmt.Errorf("pages: %w: %w", snapshot.ErrNoSpace, unix.ENOSPC)), []string{"a", "new"}, exit.Snapshot, "free some, or save to another file system"},
		{fails(fmt.Errorf("%w: it is 1, and 2 is wanted", snapshot.ErrParent)), []string{"a", "new"}, exit.Snapshot, "2 is wanted: save without --parent"},
		{fails(errors.New("out of luck")), []string{"a", "new"}, exit.Snapshot, "a is not saved: out of luck"},
		{fails(fmt.Errorf("VM is stopped: %w", api.ErrWrongState)), []string{"a", "new"}, exit.Snapshot, "VM is stopped"},
	} {
		h := newHost(t)
		h.save = test.save
		a := h.start("a", "--memory", "1M")
		args := []string{"snapshot"}
		for i, arg := range test.args {
			if i > 0 && !strings.HasPrefix(arg, "-") && test.args[i-1] != "--compress" {
				arg = filepath.Join(dir, arg)
			}
			args = append(args, arg)
		}
		code, out, errs := h.do(args...)
		if code != test.code || !strings.Contains(errs, test.want) || strings.Count(errs, "\n") != 1 || out != "" {
			t.Errorf("%v: code %d, want %d; %q, want %q; output %q", test.args, code, test.code, errs, test.want, out)
		}
		h.want("kill", "a")
		<-a
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

// TestSnapshotCanceled: Ctrl-C undoes the save, and the machine goes on.
func TestSnapshotCanceled(t *testing.T) {
	h := newHost(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	h.save = func(ctx context.Context, m *fakeMachine, host vmm.SaveHost, _ vmm.SaveOptions) (vmm.SaveReport, error) {
		o, err := host.Overlay(ctx, savehost.OverlayRequest{Below: m.cfg.Disks[0].Path, Format: chain.Raw, Size: 1 << 20})
		if err != nil {
			return vmm.SaveReport{}, err
		}
		cancel()
		<-ctx.Done()
		return vmm.SaveReport{}, errors.Join(ctx.Err(), unix.Close(o.FD), host.DropOverlay(0), host.Abort())
	}
	a := h.start("a", "--disk", path)
	var out, errs bytes.Buffer
	if code := h.env(&out, &errs).Execute(ctx, []string{"snapshot", "a", filepath.Join(dir, "snap")}); code != exit.Failure || errs.String() != "ditto: interrupted\n" || out.Len() > 0 {
		t.Errorf("code %d: %s%s", code, &out, &errs)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v", entries, err)
	}
	h.want("pause", "a")
	h.want("kill", "a")
	<-a
}

// TestSnapshotMachineEnds: what a machine that ended under the save did not use
// is removed, and what it wrote last is told.
func TestSnapshotMachineEnds(t *testing.T) {
	for _, written := range []bool{false, true} {
		h := newHost(t)
		dir := t.TempDir()
		path := filepath.Join(dir, "disk.img")
		if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		h.save = func(ctx context.Context, m *fakeMachine, host vmm.SaveHost, _ vmm.SaveOptions) (vmm.SaveReport, error) {
			o, err := host.Overlay(ctx, savehost.OverlayRequest{Below: m.cfg.Disks[0].Path, Format: chain.Raw, Size: 1 << 20})
			if err != nil {
				return vmm.SaveReport{}, err
			}
			if written {
				if _, err := unix.Pwrite(o.FD, []byte("last words"), 1<<18); err != nil {
					t.Error(err)
				}
			}
			m.Kill()
			<-ctx.Done() // the machine ends, and gives no more answers
			return vmm.SaveReport{}, errors.Join(context.Cause(ctx), unix.Close(o.FD))
		}
		a := h.start("a", "--disk", path)
		code, _, errs := h.do("snapshot", "a", filepath.Join(dir, "snap"))
		if code != exit.Snapshot || !strings.Contains(errs, "a ended before it was saved: killed") || strings.Contains(errs, "disk.snap.qcow2") != written {
			t.Errorf("written %v: code %d: %s", written, code, errs)
		}
		<-a
		entries, err := os.ReadDir(dir)
		if want := map[bool]int{false: 1, true: 2}[written]; err != nil || len(entries) != want {
			t.Errorf("written %v: left: %v, %v", written, entries, err)
		}
	}
}

// saved makes a snapshot of a machine with these flags, which has ended.
func (h *host) saved(flags ...string) string {
	h.t.Helper()
	h.save = writeSnapshot
	done := h.start("web", append([]string{"--memory", "1M"}, flags...)...)
	dir := filepath.Join(h.t.TempDir(), "snap")
	h.want("snapshot", "web", dir, "--stop")
	<-done
	return dir
}

func TestRestore(t *testing.T) {
	h := newHost(t)
	dir := h.saved("--net", "user,mtu=1400,forward=8080:80", "--net", "tap,tap=t0", "--cpus", "2")
	data := t.TempDir()
	for _, test := range []struct {
		flags []string
		name  string
		want  vmproc.Restore
	}{
		{nil, "web", vmproc.Restore{Mode: vmm.RestoreLazy}},
		{[]string{"--name", "other", "--eager"}, "other", vmproc.Restore{Mode: vmm.RestoreEager}},
		{[]string{"--prefetch"}, "web", vmproc.Restore{Mode: vmm.RestorePrefetch}},
	} {
		done := h.background(append([]string{"restore", dir, "--sandbox=off", "--overlay-dir", data}, test.flags...)...)
		got := <-h.restored
		test.want.Dir, test.want.Overlays, test.want.ID = dir, data, got.ID
		if diff := cmp.Diff(test.want, got); diff != "" || got.ID == (snapshot.ID{}) {
			t.Errorf("%v: %s", test.flags, diff)
		}
		var rows []psRow
		if err := json.Unmarshal([]byte(h.want("ps", "--json")), &rows); err != nil || len(rows) != 1 || rows[0].Name != test.name || rows[0].CPUs != 2 {
			t.Errorf("%v: %+v, %v", test.flags, rows, err)
		}
		if code, _, errs := h.do("restore", dir, "--name", test.name, "--sandbox=off"); code != exit.NameInUse || !strings.Contains(errs, "choose another name") {
			t.Errorf("the same name: code %d: %s", code, errs)
		}
		<-h.restored
		h.want("kill", test.name)
		<-done
	}
	for _, test := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"restore"}, exit.Usage, "accepts 1 arg"},
		{[]string{"restore", filepath.Join(data, "absent")}, exit.Snapshot, "no such file"},
		{[]string{"restore", data}, exit.Snapshot, "not an intact snapshot"},
		{[]string{"restore", dir, "--eager", "--prefetch"}, exit.Usage, "none of the others"},
		{[]string{"restore", dir, "--net", "user"}, exit.Usage, "the machine has 2 networks, and --net was given for 1: give one for each"},
		{[]string{"restore", dir, "--net", "user,mtu=9000", "--net", "user"}, exit.Usage, "an MTU that the guest knows, 1400"},
		{[]string{"restore", dir, "--name", "a b"}, exit.Usage, "not a usable name"},
		{[]string{"clone", dir, "-n", "0"}, exit.Usage, "use 1 to"},
		{[]string{"clone", dir, "--name", "a b", "-p", "none"}, exit.Usage, "not a usable name"},
	} {
		code, out, errs := h.do(test.args...)
		if code != test.code || !strings.Contains(errs, test.want) || out != "" {
			t.Errorf("ditto %v: code %d, want %d; %q, want %q; output %q", test.args, code, test.code, errs, test.want, out)
		}
	}
}

// restoreConfig is the configuration that flags give a saved machine.
func (h *host) restoreConfig(dir string, flags ...string) config.Config {
	h.t.Helper()
	m, err := openSaved(dir)
	if err != nil {
		h.t.Fatal(err)
	}
	f := &restoreFlags{}
	cmd := (&Env{}).restoreCommand()
	cmd.ResetFlags()
	f.add(cmd)
	if err := cmd.ParseFlags(flags); err != nil {
		h.t.Fatal(err)
	}
	if err := m.apply(&f.runFlags, cmd.Flags()); err != nil {
		h.t.Fatal(err)
	}
	return m.config
}

// TestRestoreConfig: networks keep what the guest knows of them, and the sandbox
// is the user's to switch off.
func TestRestoreConfig(t *testing.T) {
	h := newHost(t)
	dir := h.saved("--net", "user,mtu=1400,forward=8080:80", "--net", "tap,mac=52:54:00:00:00:01", "--sandbox=off")
	first, err := config.Net{}.HardwareAddr("web", 0)
	if err != nil {
		t.Fatal(err)
	}
	user := config.Net{MTU: 1400, MAC: first.String(), Forwards: []config.Forward{{Protocol: "tcp", HostPort: 8080, GuestPort: 80}}}
	tap := config.Net{Mode: config.NetTap, MAC: "52:54:00:00:00:01"}
	moved, closed := user, user
	moved.Forwards = []config.Forward{{Protocol: "tcp", HostPort: 8081, GuestPort: 80}}
	closed.Forwards = nil
	for _, test := range []struct {
		flags   []string
		nets    []config.Net
		sandbox config.OnOff
	}{
		{nil, []config.Net{user, tap}, true},
		{[]string{"--sandbox=off"}, []config.Net{user, tap}, false},
		{[]string{"-p", "8081:80"}, []config.Net{moved, tap}, true},
		{[]string{"-p", "none"}, []config.Net{closed, tap}, true},
		{[]string{"--net", "user", "--net", "user,mac=52:54:00:00:00:02"}, []config.Net{closed, {MAC: "52:54:00:00:00:02"}}, true},
		{[]string{"--net", "user", "--net", "user", "-p", "8081:80"}, []config.Net{moved, {MAC: tap.MAC}}, true},
	} {
		cfg := h.restoreConfig(dir, test.flags...)
		if diff := cmp.Diff(test.nets, cfg.Nets); diff != "" || cfg.Sandbox != test.sandbox {
			t.Errorf("%v: sandbox %v\n%s", test.flags, cfg.Sandbox, diff)
		}
	}
}

// TestHostileConfig: a manifest whose configuration is nonsense is refused.
func TestHostileConfig(t *testing.T) {
	h := newHost(t)
	space, err := memory.New(memory.Config{Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer space.Close()
	for name, text := range map[string]string{"none": "", "unknown": `{"cpus":1,"warp":9}`, "invalid": `{"cpus":1000}`, "a list": `[]`} {
		dir := filepath.Join(t.TempDir(), "snap")
		target, err := snapshot.NewTarget(dir)
		if err != nil {
			t.Fatal(err)
		}
		w, err := snapshot.Create(target, snapshot.Options{Space: space, Config: json.RawMessage(text)})
		if err == nil {
			err = w.Capture(t.Context(), snapshot.Capture{})
		}
		if err == nil {
			_, err = w.Commit(t.Context(), nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		if code, _, errs := h.do("restore", dir); code != exit.Snapshot || !strings.Contains(errs, dir) || strings.Count(errs, "\n") != 1 {
			t.Errorf("%s: code %d: %s", name, code, errs)
		}
	}
}

// TestCloneJob: what clones have for themselves.
func TestCloneJob(t *testing.T) {
	h := newHost(t)
	dir := h.saved("--net", "user,forward=8080:80", "--net", "tap,mac=52:54:00:00:00:01")
	var out, errs bytes.Buffer
	e := h.env(&out, &errs)
	f := &restoreFlags{overlays: "/o"}
	cmd := e.cloneCommand()
	cmd.ResetFlags()
	f.add(cmd)
	if err := cmd.ParseFlags([]string{"--overlay-dir", "/o"}); err != nil {
		t.Fatal(err)
	}
	job, err := e.cloneJob(cmd, dir, f, true)
	if err != nil {
		t.Fatal(err)
	}
	mac, err := config.Net{}.HardwareAddr("web", 0)
	if err != nil {
		t.Fatal(err)
	}
	want := []config.Net{{MAC: mac.String()}, {Mode: config.NetTap}}
	if diff := cmp.Diff(want, job.Config.Nets); diff != "" {
		t.Error(diff)
	}
	if r := job.Restore; !r.Temporary || r.Overlays != "/o" || r.Dir != dir {
		t.Errorf("%+v", r)
	}
	if !strings.Contains(errs.String(), "port forwards of the saved machine: 8080:80") {
		t.Errorf("%q", &errs)
	}
	done := h.start("web-2")
	names, err := e.cloneNames("web", 3)
	if diff := cmp.Diff([]string{"web-1", "web-3", "web-4"}, names); diff != "" || err != nil {
		t.Error(err, diff)
	}
	h.want("kill", "web-2")
	<-done
}

func TestCloneErrors(t *testing.T) {
	broken := exit.Errorf(exit.Disk, "no disk")
	if err := cloneErrors([]cloneRow{{Name: "a"}, {Name: "b"}}); err != nil {
		t.Error(err)
	}
	err := cloneErrors([]cloneRow{
		{Name: "a"}, {Name: "b", err: broken, Error: "no disk"}, {Name: "c", err: errors.New("x"), Error: "x"}, {Name: "d", err: broken, Error: "no disk"},
	})
	if err == nil || err.Error() != "b, d not started: no disk; c not started: x" || vmproc.Classify(err) != exit.Disk {
		t.Errorf("%v", err)
	}
}

func TestSnapshotCompletion(t *testing.T) {
	h := newHost(t)
	snap := h.saved()
	dir := filepath.Dir(snap)
	if err := os.Mkdir(filepath.Join(dir, "way"), 0o700); err != nil {
		t.Fatal(err)
	}
	done := h.start("alpha")
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"snapshot", "a"}, "alpha\n"},
		{[]string{"snapshot", "alpha", dir + "/", ""}, ""},
		{[]string{"snapshot", "--compress", ""}, "none\nzstd\n"},
		{[]string{"snapshot", "--parent", dir + "/"}, snap + "\n" + dir + "/way/\n"},
		{[]string{"restore", dir + "/"}, snap + "\n" + dir + "/way/\n"},
		{[]string{"restore", dir + "/w"}, dir + "/way/\n"},
		{[]string{"restore", snap, dir + "/"}, ""},
		{[]string{"clone", dir + "/s"}, snap + "\n"},
	} {
		code, out, _ := h.do(append([]string{"__complete"}, test.args...)...)
		words := out[:strings.LastIndex(out, ":")]
		if code != 0 || !strings.HasPrefix(words, test.want) || test.want == "" && words != "" {
			t.Errorf("%v: %q, want %q", test.args, words, test.want)
		}
	}
	h.want("kill", "alpha")
	<-done
}
