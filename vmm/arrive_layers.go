package vmm

import (
	"errors"
	"fmt"
	"io"
	"log/slog"

	"golang.org/x/sys/unix"

	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/images/layer"
	"ditto.vm/migration/live"
	"ditto.vm/vmm/config"
)

// layerReaders read the layers of a VM that arrives from what lies here, while
// the other side still writes them: every page that is made of them is proven.
type layerReaders struct {
	layers []io.ReaderAt  // by their numbers in the offer; nil for those that are not here
	disks  []*chain.Chain // as configured, unlocked
	files  []*layer.File
	copies *arrivingDisks // nil for disks that are shared
}

// openLayers opens what is here of the layers of an offer. The VM's disks must
// be, and a disk that it writes must be one that can be written.
func openLayers(o live.Offer, cfg *config.Config, copies *arrivingDisks, log *slog.Logger) (*layerReaders, error) {
	r := &layerReaders{layers: make([]io.ReaderAt, len(o.Layers)), copies: copies}
	if copies == nil {
		if err := r.openDisks(o, cfg); err != nil {
			return r, err
		}
	}
	for i, l := range o.Layers {
		if l.Disk >= 0 {
			if err := r.match(i, l); err != nil {
				return r, err
			}
			continue
		}
		if bootFile(cfg, l.Path) {
			r.openFile(i, l, log)
		}
	}
	return r, nil
}

// openDisks opens disks that both sides see.
func (r *layerReaders) openDisks(o live.Offer, cfg *config.Config) error {
	for i, d := range cfg.Disks {
		err := r.openDisk(d)
		if err != nil && o.Storage == live.StorageProven {
			return fmt.Errorf("disk %d of the VM is not here: %w (or have it copied with 'ditto migrate --disks copy')", i, err)
		}
		if err == nil && o.Storage == live.StorageProven && i < len(o.Disks) {
			err = provenShared(&o.Disks[i], r.disks[i])
		}
		if err != nil {
			return fmt.Errorf("disk %d of the VM is not here: %w", i, err)
		}
	}
	return nil
}

// openDisk opens a disk without its locks.
func (r *layerReaders) openDisk(d config.Disk) error {
	if !d.ReadOnly {
		if err := unix.Access(d.Path, unix.W_OK); err != nil && !errors.Is(err, unix.ENOENT) {
			return &disk.Error{Path: d.Path, Err: err, Reason: "may not be written: " + err.Error(), Cure: "change its owner or mode"}
		}
	}
	c, err := chain.Open(d.Path, chain.Options{Unlocked: true, Format: d.Format})
	if err != nil {
		return err
	}
	r.disks = append(r.disks, c)
	return nil
}

// match finds the layer of a disk. Another one than was offered names nothing, but
// a top that has another size is no disk of this VM.
func (r *layerReaders) match(i int, l live.Layer) error {
	if r.copies != nil {
		if from := r.copies.reader(l); from != nil {
			r.layers[i] = from
		}
		return nil
	}
	if l.Disk >= len(r.disks) {
		return fmt.Errorf("the offered VM: a layer of disk %d, and there are %d", l.Disk, len(r.disks))
	}
	layers := r.disks[l.Disk].Layers()
	if l.Depth >= len(layers) {
		return nil
	}
	here := layers[l.Depth]
	size := here.Size()
	if here.Format() == chain.Raw {
		size = here.File().Size()
	}
	switch {
	case sameLayer(l, string(here.Format()), size):
		r.layers[i] = here
	case l.Depth == 0:
		return fmt.Errorf("disk %d of the VM is %s (%s) of %d bytes there, and %s (%s) of %d bytes here: share it, or have it copied with 'ditto migrate --disks copy'",
			l.Disk, l.Path, l.Format, l.Size, here.Path(), here.Format(), size)
	}
	return nil
}

// openFile opens what the VM has booted. Without, it cannot restart, and no more.
func (r *layerReaders) openFile(i int, l live.Layer, log *slog.Logger) {
	f, err := layer.OpenFile(l.Path)
	if err != nil {
		log.Warn("what the guest has booted is not here", "err", err)
		return
	}
	r.files = append(r.files, f)
	if f.Size() == l.Size {
		r.layers[i] = f
	}
}

// at returns a layer, or nil.
func (r *layerReaders) at(n int) io.ReaderAt {
	if r == nil || n < 0 || n >= len(r.layers) {
		return nil
	}
	return r.layers[n]
}

// teach lets the readers tell what they hear.
func (r *layerReaders) teach(l *learned) {
	for i, from := range r.layers {
		if from != nil {
			r.layers[i] = &layerReader{from, i, l}
		}
	}
}

// drop closes the readers, and lets the host forget what it has read of files
// that somebody else has written. What is opened later is cold: on the same host
// there is one cache for all, and with NFS an open asks the server.
func (r *layerReaders) drop() error {
	var errs []error
	for _, c := range r.disks {
		errs = append(errs, c.DropCache())
	}
	return errors.Join(append(errs, r.close())...)
}

// close closes what is open. Twice is once.
func (r *layerReaders) close() error {
	if r == nil {
		return nil
	}
	var errs []error
	for _, c := range r.disks {
		errs = append(errs, c.Close())
	}
	for _, f := range r.files {
		errs = append(errs, f.Close())
	}
	r.layers, r.disks, r.files = nil, nil, nil
	return errors.Join(errs...)
}
