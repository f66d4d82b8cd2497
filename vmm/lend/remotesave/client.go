package remotesave

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm"
	"ditto.vm/vmm/lend"
	"ditto.vm/vmm/savehost"
)

// Call saves the machine whose socket for operations is at path, with what host
// makes. When ctx ends the save is canceled: the machine goes on, and nothing is
// left of the snapshot. After an error that wraps [lend.ErrGone] the machine has
// not said what it still uses.
func Call(ctx context.Context, path string, host vmm.SaveHost, o vmm.SaveOptions) (r vmm.SaveReport, err error) {
	l := &lender{host: host, progress: o.Progress}
	err = lend.Client{Kinds: Kinds(), Answer: l.answer, Event: l.event}.Call(ctx, path, operation, options{
		Parent: o.Parent, ParentPath: o.ParentPath, Compression: o.Compression, Stop: o.Stop, Paused: o.Paused,
	}, &r)
	return r, err
}

// lender does what a machine asks for.
type lender struct {
	host     vmm.SaveHost
	progress func(vmm.SaveProgress)
	created  int
}

// event passes on how far the save is.
func (l *lender) event(body json.RawMessage) {
	var p vmm.SaveProgress
	if l.progress != nil && json.Unmarshal(body, &p) == nil && p.Done <= p.Total && len(p.Phase) <= lend.MaxName {
		l.progress(p)
	}
}

// maxCreated bounds the files of a snapshot.
const maxCreated = snapshot.MaxSections + 3

// answer does one thing that the machine asks for.
func (l *lender) answer(ctx context.Context, what string, args json.RawMessage) (any, []*os.File, error) {
	switch what {
	case askCreate:
		return l.create(args)
	case askCommit:
		return nil, nil, l.host.Commit()
	case askAbort:
		return nil, nil, l.host.Abort()
	case askOverlay:
		return l.overlay(ctx, args)
	case askDropOverlay:
		return nil, nil, l.dropOverlay(args)
	case askOpen:
		return l.open(args)
	}
	return nil, nil, fmt.Errorf("%w: a save has no use for %s", lend.ErrProtocol, what)
}

// arguments decodes what goes with something that is asked.
func arguments[T any](body json.RawMessage) (args T, err error) {
	if err := json.Unmarshal(body, &args); err != nil {
		return args, fmt.Errorf("%w: %w", lend.ErrProtocol, err)
	}
	return args, nil
}

func (l *lender) create(body json.RawMessage) (any, []*os.File, error) {
	args, err := arguments[createArgs](body)
	if err == nil {
		err = checkFileName(args.Name, true)
	}
	if l.created++; err == nil && l.created > maxCreated {
		err = fmt.Errorf("%w: more than %d files", lend.ErrProtocol, maxCreated)
	}
	if err != nil {
		return nil, nil, err
	}
	f, err := l.host.Create(args.Name)
	if err != nil {
		return nil, nil, err
	}
	return nil, []*os.File{f}, nil
}

func (l *lender) open(body json.RawMessage) (any, []*os.File, error) {
	args, err := arguments[openArgs](body)
	if err == nil {
		err = checkFileName(args.Name, false)
	}
	if err != nil {
		return nil, nil, err
	}
	f, err := l.host.OpenSnapshotFile(args.Dir, args.Name)
	if err != nil {
		return nil, nil, err
	}
	return nil, []*os.File{f}, nil
}

func (l *lender) overlay(ctx context.Context, body json.RawMessage) (any, []*os.File, error) {
	args, err := arguments[overlayArgs](body)
	if err == nil {
		err = args.check()
	}
	if err != nil {
		return nil, nil, err
	}
	made, err := l.host.Overlay(ctx, savehost.OverlayRequest(args))
	if err != nil {
		return nil, nil, err
	}
	var files []*os.File
	for _, fd := range []int{made.FD, made.Buffered} {
		if fd >= 0 {
			files = append(files, os.NewFile(uintptr(fd), made.Path))
		}
	}
	return overlayReply{made.Path}, files, nil
}

func (l *lender) dropOverlay(body json.RawMessage) error {
	args, err := arguments[dropArgs](body)
	if err != nil {
		return err
	}
	return l.host.DropOverlay(args.Disk)
}
