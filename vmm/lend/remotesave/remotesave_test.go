package remotesave

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm"
	"ditto.vm/vmm/lend"
	"ditto.vm/vmm/registry"
	"ditto.vm/vmm/savehost"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// saver is a machine whose save is a function.
type saver func(context.Context, vmm.SaveHost, vmm.SaveOptions) (vmm.SaveReport, error)

func (s saver) Save(ctx context.Context, host vmm.SaveHost, o vmm.SaveOptions) (vmm.SaveReport, error) {
	return s(ctx, host, o)
}

// serve runs a machine and returns its socket.
func serve(t *testing.T, s saver) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "ditto-save-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	l, err := lend.Listen(filepath.Join(dir, "ops.sock"))
	if err != nil {
		t.Fatal(err)
	}
	server := lend.NewServer(Operations(s), Kinds(), slog.New(slog.NewTextHandler(t.Output(), nil)))
	server.Serve(l)
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "ops.sock")
}

// newDisk makes a raw disk in a folder of its own.
func newDisk(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func local(t *testing.T, path string, disks ...registry.Disk) *savehost.Local {
	t.Helper()
	host, err := savehost.NewLocal(path, savehost.Options{Check: CheckDisks(disks)})
	if err != nil {
		t.Fatal(err)
	}
	return host
}

// left lists a folder.
func left(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	names := []string{}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func write(host vmm.SaveHost, names ...string) error {
	for _, name := range names {
		f, err := host.Create(name)
		if err != nil {
			return err
		}
		_, err = f.WriteString(name)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// TestSave: a machine writes files, freezes its disk under an overlay, and
// commits.
func TestSave(t *testing.T) {
	path := newDisk(t)
	disk, err := chain.Open(path, chain.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	want := vmm.SaveReport{
		ID: snapshot.ID{1}, Pause: time.Millisecond, Took: time.Second, Holds: snapshot.Holds{Unique: 4096},
		Stored: 5000, Rounds: 3, Overlays: []string{"", "x"}, Parent: "p",
	}
	options := vmm.SaveOptions{Parent: "/parent", ParentPath: "../parent", Compression: snapshot.Zstd, Stop: true, Paused: true}
	socket := serve(t, func(ctx context.Context, host vmm.SaveHost, o vmm.SaveOptions) (vmm.SaveReport, error) {
		none := vmm.SaveReport{}
		o.Progress(vmm.SaveProgress{Phase: vmm.SaveMemory, Done: 1, Total: 3})
		o.Progress(vmm.SaveProgress{Phase: vmm.SaveMemory, Done: 2, Total: 3}) // too soon
		o.Progress(vmm.SaveProgress{Phase: vmm.SaveMemory, Done: 3, Total: 3})
		o.Progress = nil
		if diff := cmp.Diff(options, o); diff != "" {
			t.Error(diff)
		}
		if err := write(host, "pages", "pagemap", "sections/cpu", "manifest.json"); err != nil {
			return none, err
		}
		overlay, err := host.Overlay(ctx, savehost.OverlayRequest{Below: path, Format: chain.Raw, Size: disk.Size()})
		if err == nil {
			err = disk.StackFD(overlay.Path, overlay.FD, overlay.Buffered)
		}
		if err != nil {
			return none, err
		}
		return want, host.Commit()
	})
	var heard []vmm.SaveProgress
	sent := options
	sent.Progress = func(p vmm.SaveProgress) { heard = append(heard, p) }
	snap := filepath.Join(t.TempDir(), "snap")
	got, err := Call(t.Context(), socket, local(t, snap, registry.Disk{Path: path}), sent)
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Fatalf("%v\n%s", err, diff)
	}
	if diff := cmp.Diff([]vmm.SaveProgress{{Phase: "memory", Done: 1, Total: 3}, {Phase: "memory", Done: 3, Total: 3}}, heard); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"manifest.json", "pagemap", "pages", "sections"}, left(t, snap)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"disk.img", "disk.snap.qcow2"}, left(t, filepath.Dir(path))); diff != "" {
		t.Error(diff)
	}
	if err := disk.WriteAtv([][]byte{make([]byte, 4096)}, 0); err != nil {
		t.Errorf("the overlay that was lent cannot be written: %v", err)
	}
}

// TestDirectOverlay: an overlay for a disk without the host's cache is lent
// twice.
func TestDirectOverlay(t *testing.T) {
	path := newDisk(t)
	socket := serve(t, func(ctx context.Context, host vmm.SaveHost, _ vmm.SaveOptions) (vmm.SaveReport, error) {
		o, err := host.Overlay(ctx, savehost.OverlayRequest{Below: path, Format: chain.Raw, Size: 1 << 20, Direct: true})
		if err != nil {
			return vmm.SaveReport{}, err
		}
		flags, err := unix.FcntlInt(uintptr(o.FD), unix.F_GETFL, 0)
		if err != nil || flags&unix.O_DIRECT == 0 || o.Buffered < 0 {
			t.Errorf("flags %#x, %+v, %v", flags, o, err)
		}
		return vmm.SaveReport{}, errors.Join(unix.Close(o.FD), unix.Close(o.Buffered), host.DropOverlay(0))
	})
	host := local(t, filepath.Join(t.TempDir(), "snap"), registry.Disk{Path: path})
	defer host.Abort()
	_, err := Call(t.Context(), socket, host, vmm.SaveOptions{Compression: snapshot.None})
	if errors.Is(err, unix.EINVAL) {
		t.Skipf("%v: run the test with TMPDIR on a file system that has O_DIRECT", err)
	}
	if err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"disk.img"}, left(t, filepath.Dir(path))); diff != "" {
		t.Error(diff)
	}
}

// TestCanceled: the machine undoes through the client what it did, and the
// client waits for it.
func TestCanceled(t *testing.T) {
	path := newDisk(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	socket := serve(t, func(ctx context.Context, host vmm.SaveHost, _ vmm.SaveOptions) (vmm.SaveReport, error) {
		if err := write(host, "pages"); err != nil {
			t.Error(err)
		}
		o, err := host.Overlay(ctx, savehost.OverlayRequest{Below: path, Format: chain.Raw, Size: 1 << 20})
		if err != nil {
			t.Error(err)
		}
		cancel()
		<-ctx.Done()
		return vmm.SaveReport{}, errors.Join(ctx.Err(), unix.Close(o.FD), host.DropOverlay(0), host.Abort())
	})
	dir := t.TempDir()
	_, err := Call(ctx, socket, local(t, filepath.Join(dir, "snap"), registry.Disk{Path: path}), vmm.SaveOptions{Compression: snapshot.None})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if names := append(left(t, dir), left(t, filepath.Dir(path))...); !cmp.Equal(names, []string{"disk.img"}) {
		t.Errorf("left: %v", names)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the disk is left with mode %v, %v", info.Mode(), err)
	}
}

// TestErrors: what a caller decides by arrives on both sides.
func TestErrors(t *testing.T) {
	for _, want := range []error{
		snapshot.ErrBusy, snapshot.ErrNoSpace, snapshot.ErrParent, snapshot.ErrLayerWritten, disk.ErrLocked, unix.ENOSPC, context.Canceled,
	} {
		socket := serve(t, func(context.Context, vmm.SaveHost, vmm.SaveOptions) (vmm.SaveReport, error) {
			return vmm.SaveReport{}, fmt.Errorf("save: %w", want)
		})
		_, err := Call(t.Context(), socket, nil, vmm.SaveOptions{Compression: snapshot.None})
		if !errors.Is(err, want) || err.Error() != "save: "+want.Error() {
			t.Errorf("%v: %v", want, err)
		}
	}
	socket := serve(t, func(_ context.Context, host vmm.SaveHost, _ vmm.SaveOptions) (vmm.SaveReport, error) {
		_, err := host.OpenSnapshotFile("/parent", "pages")
		if !errors.Is(err, snapshot.ErrParent) {
			t.Errorf("%v", err)
		}
		return vmm.SaveReport{}, err
	})
	dir := t.TempDir()
	if _, err := Call(t.Context(), socket, local(t, filepath.Join(dir, "snap")), vmm.SaveOptions{Compression: snapshot.None}); !errors.Is(err, snapshot.ErrParent) {
		t.Errorf("%v", err)
	}
	for _, o := range []vmm.SaveOptions{
		{}, {Compression: "lz4"}, {Compression: snapshot.None, Parent: "/x"}, {Compression: snapshot.None, Parent: "x", ParentPath: "x"},
	} {
		if _, err := Call(t.Context(), socket, nil, o); err == nil {
			t.Errorf("%+v was taken", o)
		}
	}
}

// TestHostileMachine: a machine that a guest has taken over asks for what is not
// its own.
func TestHostileMachine(t *testing.T) {
	dir := t.TempDir()
	own, other := newDisk(t), newDisk(t)
	if err := os.WriteFile(filepath.Join(dir, "secret"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	readOnly, temporary := newDisk(t), newDisk(t)
	host := local(t, filepath.Join(dir, "snap"),
		registry.Disk{Path: own}, registry.Disk{Path: readOnly, ReadOnly: true}, registry.Disk{Path: temporary, Temporary: true})
	defer host.Abort()
	l := &lender{host: host}
	overlay := func(disk int, below string, format chain.Format) string {
		b, err := json.Marshal(overlayArgs{Disk: disk, Below: below, Format: format, Size: 1 << 20})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	for _, test := range []struct{ what, args string }{
		{"shell", `{}`},
		{askCreate, `{"name":"../secret"}`},
		{askCreate, `{"name":"sections/../../secret"}`},
		{askCreate, `{"name":"sections/"}`},
		{askCreate, `{"name":"workingset"}`},
		{askCreate, `{"name":""}`},
		{askCreate, `[]`},
		{askOpen, `{"dir":"` + dir + `","name":"secret"}`},
		{askOpen, `{"dir":"` + dir + `","name":"pages"}`},
		{askOpen, `{"dir":"","name":"manifest.json"}`},
		{askOverlay, overlay(0, other, chain.Raw)},
		{askOverlay, overlay(0, "/etc/passwd", chain.Raw)},
		{askOverlay, overlay(0, own, chain.Qcow2)},
		{askOverlay, overlay(0, own, "vmdk")},
		{askOverlay, overlay(0, filepath.Base(own), chain.Raw)},
		{askOverlay, overlay(1, readOnly, chain.Raw)},
		{askOverlay, overlay(2, temporary, chain.Raw)},
		{askOverlay, overlay(3, own, chain.Raw)},
		{askOverlay, overlay(-1, own, chain.Raw)},
		{askOverlay, `{"disk":0,"below":"` + own + `","format":"raw","size":-4096}`},
	} {
		reply, files, err := l.answer(t.Context(), test.what, json.RawMessage(test.args))
		if err == nil || reply != nil || files != nil {
			t.Errorf("%s %s: %v, %d files, %v", test.what, test.args, reply, len(files), err)
		}
	}
	for _, path := range []string{own, other, readOnly, temporary} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 || len(left(t, filepath.Dir(path))) != 1 {
			t.Errorf("%s was touched: %v", path, err)
		}
	}
	for range maxCreated {
		_, _, _ = l.create(json.RawMessage(`{"name":"../x"}`))
	}
	if _, _, err := l.create(json.RawMessage(`{"name":"pages"}`)); !errors.Is(err, lend.ErrProtocol) {
		t.Errorf("%d files: %v", maxCreated+1, err)
	}
}

// TestCheckDisks: overlays on a machine's own disk are the machine's.
func TestCheckDisks(t *testing.T) {
	base := newDisk(t)
	dir := filepath.Dir(base)
	first, second, stranger := filepath.Join(dir, "first.qcow2"), filepath.Join(dir, "second.qcow2"), filepath.Join(dir, "stranger.qcow2")
	for _, o := range []struct {
		path, below string
		format      chain.Format
	}{{first, base, chain.Raw}, {second, first, chain.Qcow2}, {stranger, newDisk(t), chain.Raw}} {
		if err := chain.CreateOverlay(o.path, o.below, o.format, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		began  registry.Disk
		below  string
		format chain.Format
		want   string // in the error
	}{
		{registry.Disk{Path: base}, base, chain.Raw, ""},
		{registry.Disk{Path: base, Format: chain.Raw}, base, chain.Raw, ""},
		{registry.Disk{Path: base}, second, chain.Qcow2, ""},
		{registry.Disk{Path: first}, first, chain.Qcow2, ""},
		{registry.Disk{Path: first}, second, chain.Qcow2, ""},
		{registry.Disk{Path: first}, second, chain.Raw, "is said to be raw and is qcow2"},
		{registry.Disk{Path: first, Format: chain.Raw}, first, chain.Qcow2, "is said to be qcow2 and is raw"},
		{registry.Disk{Path: second}, first, chain.Qcow2, "not"},
		{registry.Disk{Path: base}, stranger, chain.Qcow2, "not"},
		{registry.Disk{Path: filepath.Join(dir, "gone")}, base, chain.Raw, "no such file"},
		{registry.Disk{Path: base, Temporary: true}, base, chain.Raw, "--keep"},
	} {
		err := CheckDisks([]registry.Disk{test.began})(savehost.OverlayRequest{Below: test.below, Format: test.format})
		if (test.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v, overlay on %s (%s): %v, want %q", test.began, test.below, test.format, err, test.want)
		}
	}
	// Images below each other go round in circles.
	loop := filepath.Join(dir, "loop.qcow2")
	if err := chain.CreateOverlay(loop, base, chain.Raw, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := chain.CreateOverlay(filepath.Join(dir, "l2.qcow2"), loop, chain.Qcow2, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "l2.qcow2"), loop); err != nil {
		t.Fatal(err)
	}
	if err := CheckDisks([]registry.Disk{{Path: first}})(savehost.OverlayRequest{Below: loop, Format: chain.Qcow2}); err == nil {
		t.Error("an image below itself is a disk of the machine")
	}
}

// TestHostileClient: a client lends what was not asked for.
func TestHostileClient(t *testing.T) {
	dir := t.TempDir()
	open := func(path string, flags int) func() (*os.File, error) {
		return func() (*os.File, error) { return os.OpenFile(path, flags, 0o600) }
	}
	for _, name := range []string{"full", "empty", "other"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "full"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	full, empty := filepath.Join(dir, "full"), filepath.Join(dir, "empty")
	create := func(h *host) error { return discard(h.Create("pages")) }
	read := func(h *host) error { return discard(h.OpenSnapshotFile("/parent", "pages")) }
	overlay := func(direct bool) func(h *host) error {
		return func(h *host) error {
			o, err := h.Overlay(context.Background(), savehost.OverlayRequest{Below: "/d", Format: chain.Raw, Size: 4096, Direct: direct})
			for _, fd := range []int{o.FD, o.Buffered} {
				if err == nil && fd >= 0 {
					_ = unix.Close(fd)
				}
			}
			return err
		}
	}
	for name, test := range map[string]struct {
		ask   func(h *host) error
		path  string
		lends []func() (*os.File, error)
		ok    bool
	}{
		"a new file":         {create, "", []func() (*os.File, error){open(empty, os.O_RDWR)}, true},
		"a file with bytes":  {create, "", []func() (*os.File, error){open(full, os.O_RDWR)}, false},
		"a file to read":     {create, "", []func() (*os.File, error){open(empty, os.O_RDONLY)}, false},
		"a device":           {create, "", []func() (*os.File, error){open(os.DevNull, os.O_RDWR)}, false},
		"nothing":            {create, "", nil, false},
		"two":                {create, "", []func() (*os.File, error){open(empty, os.O_RDWR), open(empty, os.O_RDWR)}, false},
		"a parent's file":    {read, "", []func() (*os.File, error){open(full, os.O_RDONLY)}, true},
		"one to be written":  {read, "", []func() (*os.File, error){open(full, os.O_RDWR)}, false},
		"a folder":           {read, "", []func() (*os.File, error){open(dir, os.O_RDONLY)}, false},
		"an overlay":         {overlay(false), "/o", []func() (*os.File, error){open(full, os.O_RDWR)}, true},
		"without a path":     {overlay(false), "", []func() (*os.File, error){open(full, os.O_RDWR)}, false},
		"with a path of NUL": {overlay(false), "/o\x00", []func() (*os.File, error){open(full, os.O_RDWR)}, false},
		"to be read":         {overlay(false), "/o", []func() (*os.File, error){open(full, os.O_RDONLY)}, false},
		"not direct":         {overlay(true), "/o", []func() (*os.File, error){open(full, os.O_RDWR), open(full, os.O_RDWR)}, false},
	} {
		socket := serve(t, func(_ context.Context, h vmm.SaveHost, _ vmm.SaveOptions) (vmm.SaveReport, error) {
			return vmm.SaveReport{}, test.ask(h.(*host))
		})
		client := lend.Client{Answer: func(context.Context, string, json.RawMessage) (any, []*os.File, error) {
			var files []*os.File
			for _, open := range test.lends {
				f, err := open()
				if err != nil {
					t.Error(err)
				}
				files = append(files, f)
			}
			return overlayReply{test.path}, files, nil
		}}
		err := client.Call(t.Context(), socket, operation, options{Compression: snapshot.None}, nil)
		if (err == nil) != test.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// discard closes what was lent.
func discard(f *os.File, err error) error {
	if err == nil {
		err = f.Close()
	}
	return err
}
