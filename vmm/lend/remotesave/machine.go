package remotesave

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/vmm"
	"ditto.vm/vmm/lend"
	"ditto.vm/vmm/savehost"
)

// Saver is a machine that can be saved: a *vmm.VM.
type Saver interface {
	Save(ctx context.Context, host vmm.SaveHost, o vmm.SaveOptions) (vmm.SaveReport, error)
}

// Operations are what a machine's process does for clients, by their names.
func Operations(m Saver) map[string]lend.Operation {
	return map[string]lend.Operation{operation: save(m)}
}

// save is the operation.
func save(m Saver) lend.Operation {
	return func(ctx context.Context, s *lend.Session, body json.RawMessage) (any, error) {
		var o options
		if err := json.Unmarshal(body, &o); err != nil {
			return nil, fmt.Errorf("save: %w: %w", lend.ErrProtocol, err)
		}
		if err := o.check(); err != nil {
			return nil, fmt.Errorf("save: %w", err)
		}
		told := &teller{session: s}
		r, err := m.Save(ctx, &host{s}, vmm.SaveOptions{
			Parent: o.Parent, ParentPath: o.ParentPath, Compression: o.Compression,
			Stop: o.Stop, Paused: o.Paused, Progress: told.tell,
		})
		if err != nil {
			return nil, err
		}
		return r, nil
	}
}

// tellInterval is how often a client hears how far a phase is.
const tellInterval = 50 * time.Millisecond

// teller tells a client how far a save is, not too often.
type teller struct {
	session *lend.Session

	mu    sync.Mutex // guards what follows
	phase vmm.SavePhase
	last  time.Time
}

func (t *teller) tell(p vmm.SaveProgress) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if p.Phase == t.phase && p.Done < p.Total && now.Sub(t.last) < tellInterval {
		return
	}
	t.phase, t.last = p.Phase, now
	t.session.Tell(p)
}

// host has a client do what this process may not. It implements vmm.SaveHost.
//
// Undoing must work when the save is canceled: only what has a context of its
// own ends with it, and all fails when the client is gone.
type host struct{ session *lend.Session }

// Create implements snapshot.Target.
func (h *host) Create(name string) (*os.File, error) {
	if err := checkFileName(name, true); err != nil {
		return nil, err
	}
	files, err := h.session.Ask(context.Background(), askCreate, createArgs{name}, nil, 1)
	if err != nil {
		return nil, err
	}
	f := files[0]
	if err := checkNew(f); err != nil {
		_ = f.Close() // it is not what was wanted
		return nil, fmt.Errorf("create %s: %w", name, err)
	}
	return f, nil
}

// checkNew checks that a file is an empty one to be written.
func checkNew(f *os.File) error {
	if err := lend.CheckRegular(f, unix.O_RDWR); err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil && info.Size() != 0 {
		err = fmt.Errorf("%w: it has %d bytes", lend.ErrProtocol, info.Size())
	}
	return err
}

// Commit implements snapshot.Target.
func (h *host) Commit() error {
	err := h.do(askCommit, nil)
	if errors.Is(err, lend.ErrGone) {
		err = fmt.Errorf("%w: %w", savehost.ErrInDoubt, err)
	}
	return err
}

// Abort implements snapshot.Target.
func (h *host) Abort() error { return h.do(askAbort, nil) }

// DropOverlay implements vmm.SaveHost.
func (h *host) DropOverlay(disk int) error { return h.do(askDropOverlay, dropArgs{disk}) }

func (h *host) do(what string, args any) error {
	_, err := h.session.Ask(context.Background(), what, args, nil, 0)
	return err
}

// Overlay implements vmm.SaveHost.
func (h *host) Overlay(ctx context.Context, r savehost.OverlayRequest) (savehost.Overlay, error) {
	n := 1
	switch {
	case r.FreezeOnly:
		n = 0
	case r.Direct:
		n = 2
	}
	var reply overlayReply
	files, err := h.session.Ask(ctx, askOverlay, overlayArgs(r), &reply, n)
	if err != nil || n == 0 {
		return savehost.Overlay{FD: -1, Buffered: -1}, err
	}
	overlay, err := adopt(reply.Path, files)
	for _, f := range files {
		_ = f.Close() // the overlay has its own, or is of no use
	}
	if err != nil {
		return overlay, fmt.Errorf("overlay for disk %d: %w", r.Disk, err)
	}
	return overlay, nil
}

// adopt checks what an overlay is lent by, once or, the first time with O_DIRECT,
// twice, and duplicates the descriptors.
func adopt(path string, files []*os.File) (savehost.Overlay, error) {
	o := savehost.Overlay{Path: path, FD: -1, Buffered: -1}
	if err := checkPath(path); err != nil {
		return o, err
	}
	if len(files) == 1 {
		err := lend.CheckRegular(files[0], unix.O_RDWR)
		if err == nil {
			o.FD, err = duplicate(files[0])
		}
		return o, err
	}
	err := sameFile(files[0], files[1])
	if err == nil {
		o.FD, err = duplicate(files[0])
	}
	if err == nil {
		if o.Buffered, err = duplicate(files[1]); err != nil {
			_ = unix.Close(o.FD) // the error is what counts
		}
	}
	return o, err
}

// sameFile checks that a file is open twice, with O_DIRECT and without.
func sameFile(direct, buffered *os.File) error {
	err := lend.CheckRegular(direct, unix.O_RDWR|unix.O_DIRECT)
	if err == nil {
		err = lend.CheckRegular(buffered, unix.O_RDWR)
	}
	if err != nil {
		return err
	}
	a, err := direct.Stat()
	if err != nil {
		return err
	}
	b, err := buffered.Stat()
	if err == nil && !os.SameFile(a, b) {
		err = fmt.Errorf("%w: two files are lent as one", lend.ErrProtocol)
	}
	return err
}

// duplicate returns a descriptor of its own for a file.
func duplicate(f *os.File) (int, error) {
	return unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
}

// OpenSnapshotFile implements vmm.SaveHost.
func (h *host) OpenSnapshotFile(dir, name string) (*os.File, error) {
	if err := checkFileName(name, false); err != nil {
		return nil, err
	}
	files, err := h.session.Ask(context.Background(), askOpen, openArgs{dir, name}, nil, 1)
	if err != nil {
		return nil, err
	}
	if err := lend.CheckRegular(files[0], unix.O_RDONLY); err != nil {
		_ = files[0].Close() // it is not what was wanted
		return nil, fmt.Errorf("open %s of %s: %w", name, dir, err)
	}
	return files[0], nil
}
