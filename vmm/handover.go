package vmm

import (
	"errors"
	"os"

	"ditto.vm/memory"
	"ditto.vm/migration/live"
	"ditto.vm/vmm/config"
)

// Handed is what a VM keeps that goes on in another process of this host.
type Handed struct {
	// Memory are the files of guest memory in the order of its ranges; nil when it
	// is copied.
	Memory []*os.File
}

// Close closes what is not used.
func (h *Handed) Close() error {
	var errs []error
	for _, f := range h.Memory {
		errs = append(errs, f.Close())
	}
	h.Memory = nil
	return errors.Join(errs...)
}

// HandOver returns copies of what another process of this host can go on with,
// which are the caller's. The VM runs on.
func (m *VM) HandOver() (*Handed, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	files, err := m.mem.Files()
	if err != nil {
		return nil, err
	}
	return &Handed{Memory: files}, nil
}

// checkHanded refuses an offer that is of another memory than the one that is here.
func checkHanded(o live.Offer, opts Options) error {
	here := opts.Handed != nil && len(opts.Handed.Memory) > 0
	switch {
	case o.Shared && !here:
		return errors.New("the offered VM: it is to share its memory, which was not handed over")
	case !o.Shared && here:
		return errors.New("the offered VM: its memory was handed over, and is to be sent")
	}
	return nil
}

// openMemory maps guest memory: new, or that of the process that the VM comes from.
func (m *VM) openMemory() (*memory.Space, error) {
	c := memory.Config{Size: uint64(m.cfg.Memory.Size), Backing: m.cfg.Memory.Backing, HugePages: m.cfg.Memory.HugePages}
	if m.handed == nil || len(m.handed.Memory) == 0 {
		return memory.New(c)
	}
	files := m.handed.Memory
	m.handed.Memory = nil
	return memory.Open(c, files)
}

// roomForArrival reports that this host has too little memory for a VM.
func roomForArrival(m *config.Memory, o live.Offer) error {
	if o.Shared {
		return nil // it is here already
	}
	return roomFor(m, "/")
}
