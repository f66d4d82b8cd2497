package vmm

import (
	"context"
	"errors"
	"os"
	"sync"

	"ditto.vm/vmm/savehost"
)

// hookHost calls a function before each thing that is asked of it, which fails
// with what that returns.
type hookHost struct {
	SaveHost
	mu   sync.Mutex
	hook func(what string) error
}

func (h *hookHost) call(what string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.hook(what)
}

func (h *hookHost) Create(name string) (*os.File, error) {
	if err := h.call("create " + name); err != nil {
		return nil, err
	}
	return h.SaveHost.Create(name)
}

func (h *hookHost) Commit() error {
	if err := h.call("commit"); err != nil {
		return err
	}
	return h.SaveHost.Commit()
}

func (h *hookHost) Overlay(ctx context.Context, o savehost.OverlayRequest) (savehost.Overlay, error) {
	if err := h.call("overlay"); err != nil {
		return savehost.Overlay{}, err
	}
	return h.SaveHost.Overlay(ctx, o)
}

func (h *hookHost) OpenSnapshotFile(dir, name string) (*os.File, error) {
	if err := h.call("open " + name); err != nil {
		return nil, err
	}
	return h.SaveHost.OpenSnapshotFile(dir, name)
}

var errHost = errors.New("the host fails")
