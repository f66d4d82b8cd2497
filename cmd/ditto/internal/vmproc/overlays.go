package vmproc

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"ditto.vm/images/chain"
	"ditto.vm/vmm/config"
)

// overlays are what a restored machine writes to: one for each disk that it may
// write, on the image that the snapshot froze.
//
//	DIR/NAME/blk0.qcow2, blk0-2.qcow2, ...     the second time under that name
type overlays struct {
	folder string
	paths  []string
}

// newOverlays makes overlays in folder and gives them to the configuration,
// whose disks are the frozen images. What was made is removed if it fails.
func newOverlays(folder string, cfg *config.Config) (*overlays, error) {
	o := &overlays{folder: folder}
	disks := append([]config.Disk(nil), cfg.Disks...)
	for i := range disks {
		if disks[i].ReadOnly {
			continue
		}
		path, err := o.add(i, disks[i])
		if err != nil {
			return nil, errors.Join(fmt.Errorf("overlay for disk %d: %w", i, err), o.remove())
		}
		disks[i].Path, disks[i].Format = path, chain.Qcow2
	}
	cfg.Disks = disks
	return o, nil
}

// mostOverlays bounds the names that are tried for one overlay.
const mostOverlays = 10_000

// add makes the overlay of a disk.
func (o *overlays) add(disk int, d config.Disk) (string, error) {
	frozen, err := chain.Open(d.Path, chain.Options{ReadOnly: true, Format: d.Format})
	if err != nil {
		return "", err
	}
	defer func() { _ = frozen.Close() }() // it was only read
	if err := os.MkdirAll(o.folder, 0o700); err != nil {
		return "", err
	}
	for n := 1; ; n++ {
		path := filepath.Join(o.folder, fmt.Sprintf("blk%d.qcow2", disk))
		if n > 1 {
			path = filepath.Join(o.folder, fmt.Sprintf("blk%d-%d.qcow2", disk, n))
		}
		err := frozen.CreateOverlay(path)
		if errors.Is(err, fs.ErrExist) && n < mostOverlays {
			continue
		}
		if err == nil {
			o.paths = append(o.paths, path)
		}
		return path, err
	}
}

// remove removes the overlays, and their folder if nothing else is in it.
func (o *overlays) remove() error {
	var errs []error
	for _, path := range o.paths {
		errs = append(errs, os.Remove(path))
	}
	o.paths = nil
	if err := os.Remove(o.folder); err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
