package remotesave

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"ditto.vm/images/chain"
	"ditto.vm/images/qcow2"
	"ditto.vm/vmm/lend"
	"ditto.vm/vmm/registry"
	"ditto.vm/vmm/savehost"
)

// ErrTemporary is wrapped when a disk has no name: nothing could be stacked on
// it that would last.
var ErrTemporary = errors.New("the disk goes with the machine")

// CheckDisks returns the check of a [savehost.Local] that lends to a machine
// which began with these disks: what it may freeze and stack overlays on are
// they, and the overlays that were stacked on them since.
func CheckDisks(disks []registry.Disk) func(savehost.OverlayRequest) error {
	return func(r savehost.OverlayRequest) error {
		if r.Disk < 0 || r.Disk >= len(disks) {
			return fmt.Errorf("%w: the machine has no disk %d", lend.ErrProtocol, r.Disk)
		}
		if err := checkDisk(disks[r.Disk], r); err != nil {
			return fmt.Errorf("disk %d: %w", r.Disk, err)
		}
		return nil
	}
}

func checkDisk(d registry.Disk, r savehost.OverlayRequest) error {
	switch {
	case d.ReadOnly:
		return fmt.Errorf("%w: it is read-only", lend.ErrProtocol)
	case d.Temporary:
		return fmt.Errorf("%w: save clones that were made with --keep", ErrTemporary)
	}
	first, err := os.Stat(d.Path)
	if err != nil {
		return err
	}
	format, err := formatOn(r.Below, first)
	if err == nil && format == chain.Probe {
		if format = d.Format; format == chain.Probe {
			format, err = probe(r.Below)
		}
	}
	if err != nil {
		return fmt.Errorf("%s on %s: %w", r.Below, d.Path, err)
	}
	if format != r.Format {
		return fmt.Errorf("%w: %s is said to be %s and is %s", lend.ErrProtocol, r.Below, r.Format, format)
	}
	return nil
}

// formatOn returns the format of the image at path if it is an overlay on the
// file first, and chain.Probe if it is that file itself.
func formatOn(path string, first fs.FileInfo) (top chain.Format, err error) {
	for range chain.MaxDepth {
		if found, err := isFile(path, first); err != nil || found {
			return top, err
		}
		below, format, err := chain.Backing(path)
		if err != nil {
			return "", err
		}
		top, path = chain.Qcow2, below
		if format == chain.Qcow2 {
			continue
		}
		// It is the last; or there is none, which is no file.
		if found, err := isFile(path, first); err != nil || found {
			return top, err
		}
		return "", fmt.Errorf("%w: it is not a disk of the machine", lend.ErrProtocol)
	}
	return "", fmt.Errorf("%w: more than %d layers", lend.ErrProtocol, chain.MaxDepth)
}

// isFile reports whether the file at path is this one. Nothing is at "".
func isFile(path string, this fs.FileInfo) (bool, error) {
	if path == "" {
		return false, nil
	}
	info, err := os.Stat(path)
	return err == nil && os.SameFile(info, this), err
}

// probe tells by its content whether an image is raw or qcow2, as it was told
// when the machine began.
func probe(path string) (chain.Format, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var magic [len(qcow2.Magic)]byte
	if _, err := f.ReadAt(magic[:], 0); err != nil {
		return "", err
	}
	if string(magic[:]) == qcow2.Magic {
		return chain.Qcow2, nil
	}
	return chain.Raw, nil
}
