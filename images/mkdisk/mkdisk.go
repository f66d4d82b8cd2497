package mkdisk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Format is what a disk holds.
type Format string

const (
	// Raw is a disk of zeros.
	Raw Format = "raw"
	// Ext4 is an ext4 file system without a partition table.
	Ext4 Format = "ext4"
)

const (
	blockBytes    = 4096
	sizeAlign     = 1 << 20
	maxLabelBytes = 16        // of ext4
	maxSizeBytes  = 16 << 40  // of ext4 with 4 KiB blocks and 32-bit numbers
	minExt4Bytes  = 256 << 10 // mke2fs refuses less with 4 KiB blocks
)

// Options say what disk to make. Path is required.
type Options struct {
	// Path is the image to make.
	Path string
	// Format defaults to Ext4 when Folder is given and to Raw otherwise.
	Format Format
	// Folder is what an ext4 disk is filled with; "" leaves it empty.
	Folder string
	// SizeBytes is the size of the disk, rounded up to 1 MiB; 0 computes it from
	// Folder.
	SizeBytes int64
	// SlackBytes is the free space to leave when the size is computed; 0 means a
	// fifth of the content, and at least 64 MiB.
	SlackBytes int64
	// Label names an ext4 file system, in at most 16 bytes.
	Label string
	// UUID of the file system; "" draws one.
	UUID string
	// Overwrite replaces an existing file.
	Overwrite bool
}

// Disk is a finished image.
type Disk struct {
	Path           string `json:"path"`
	Format         Format `json:"format"`
	SizeBytes      int64  `json:"sizeBytes"`
	AllocatedBytes int64  `json:"allocatedBytes"` // what it takes on the host now
	Label          string `json:"label,omitempty"`
}

// ErrExists says that the image is there already and Overwrite was not given.
var ErrExists = errors.New("the file exists (say --force to replace it)")

// Make makes a disk. On failure nothing is left behind and an existing file is
// unchanged.
func Make(ctx context.Context, o Options) (*Disk, error) {
	if err := o.complete(); err != nil {
		return nil, fmt.Errorf("disk %s: %w", o.Path, err)
	}
	d, err := o.make(ctx)
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", o.Path, err)
	}
	return d, nil
}

// complete checks the options and fills in the defaults.
func (o *Options) complete() error {
	if o.Path == "" {
		return errors.New("no path given")
	}
	if o.Format == "" {
		o.Format = Raw
		if o.Folder != "" || o.Label != "" {
			o.Format = Ext4
		}
	}
	switch {
	case o.Format != Raw && o.Format != Ext4:
		return fmt.Errorf("unknown format %q (want raw or ext4)", o.Format)
	case o.SizeBytes < 0 || o.SizeBytes > maxSizeBytes || o.SlackBytes < 0 || o.SlackBytes > maxSizeBytes:
		return fmt.Errorf("a size must be between 1 byte and 16 TiB")
	case o.Format == Raw && (o.Folder != "" || o.Label != "" || o.UUID != ""):
		return errors.New("a raw disk is empty: a folder, label or UUID needs format ext4")
	case o.SizeBytes == 0 && o.Folder == "":
		return errors.New("an empty disk needs a size")
	case len(o.Label) > maxLabelBytes || strings.ContainsAny(o.Label, "/\x00\n"):
		return fmt.Errorf("label %q: want at most %d bytes, no slash", o.Label, maxLabelBytes)
	}
	if !o.Overwrite {
		if _, err := os.Lstat(o.Path); err == nil {
			return ErrExists
		}
	} else if fi, err := os.Stat(o.Path); err == nil && !fi.Mode().IsRegular() {
		return errors.New("not a regular file; refusing to replace it")
	}
	return o.checkFolder()
}

func (o *Options) checkFolder() error {
	if o.Folder == "" {
		return nil
	}
	fi, err := os.Stat(o.Folder)
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		return fmt.Errorf("%s is not a folder", o.Folder)
	}
	inside, err := contains(o.Folder, filepath.Dir(o.Path))
	if err != nil {
		return err
	}
	if inside {
		return fmt.Errorf("the image would lie inside the folder %s that it is made from", o.Folder)
	}
	return nil
}

// contains tells whether the folder inner is outer or lies below it.
func contains(outer, inner string) (bool, error) {
	a, err := realPath(outer)
	if err != nil {
		return false, err
	}
	b, err := realPath(inner)
	if err != nil {
		return false, err
	}
	rel, err := filepath.Rel(a, b)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, ".."+string(filepath.Separator)), nil
}

func realPath(p string) (string, error) {
	p, err := filepath.EvalSymlinks(p)
	if err != nil {
		return "", err
	}
	return filepath.Abs(p)
}

func (o *Options) make(ctx context.Context) (*Disk, error) {
	tmp, err := os.CreateTemp(filepath.Dir(o.Path), "."+filepath.Base(o.Path)+".new-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.Remove(tmp.Name()) }()
	defer func() { _ = tmp.Close() }()
	if err := tmp.Chmod(0o644); err != nil {
		return nil, err
	}
	if o.Format == Ext4 {
		err = o.fillExt4(ctx, tmp.Name())
	} else {
		err = tmp.Truncate(roundUp(o.SizeBytes, sizeAlign))
	}
	if err != nil {
		return nil, err
	}
	if err := tmp.Sync(); err != nil {
		return nil, err
	}
	return o.publish(tmp)
}

// publish gives the finished file its name.
func (o *Options) publish(tmp *os.File) (*Disk, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(tmp.Fd()), &st); err != nil {
		return nil, err
	}
	if o.Overwrite {
		if err := os.Rename(tmp.Name(), o.Path); err != nil {
			return nil, err
		}
	} else if err := os.Link(tmp.Name(), o.Path); err != nil {
		if errors.Is(err, os.ErrExist) {
			return nil, ErrExists
		}
		// A file system without hard links.
		if err := os.Rename(tmp.Name(), o.Path); err != nil {
			return nil, err
		}
	}
	return &Disk{Path: o.Path, Format: o.Format, SizeBytes: st.Size, AllocatedBytes: st.Blocks * 512, Label: o.Label}, nil
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }

// toolTimeLimit ends a tool that was told to stop and does not.
const toolTimeLimit = 5 * time.Second
