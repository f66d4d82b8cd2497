package qcow2

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"ditto.vm/images/disk"
)

// CreateOptions describe a new image.
type CreateOptions struct {
	// Size of the disk in bytes, a multiple of 512.
	Size int64
	// ClusterSize in bytes, a power of two, 64 KiB if 0.
	ClusterSize int64
	// Backing is the name of the backing image, relative to the new image's
	// folder unless absolute; "" for none. BackingFormat is raw or qcow2.
	Backing, BackingFormat string
}

const (
	defaultClusterBits = 16
	defaultOrder       = 4 // refcounts of 16 bits, as everybody has
)

// Create makes an image of version 3. It appears under its name when it is
// complete and stable, and never takes the place of another file.
func Create(path string, o CreateOptions) error {
	b, err := layOut(o)
	if err != nil {
		var e *disk.Error
		if errors.As(err, &e) {
			e.Path = path
		}
		return err
	}
	err = appear(path, b)
	switch {
	case errors.Is(err, fs.ErrExist):
		return &disk.Error{Path: path, Err: err, Reason: "exists already", Cure: "remove it, or name another file"}
	case err != nil:
		return &disk.Error{Path: path, Err: err, Reason: "cannot be made: " + err.Error(), Cure: "check the folder, its rights and its space"}
	}
	return nil
}

// appear writes a file next to its place, makes it stable and gives it its
// name.
func appear(path string, pieces []piece) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		_ = os.Remove(f.Name()) // its other name stays
		err = errors.Join(err, f.Close())
	}()
	for _, p := range pieces {
		if _, err := f.WriteAt(p.data, p.offset); err != nil {
			return err
		}
	}
	if err := errors.Join(f.Chmod(0o644), f.Sync()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// layOut is the content of a new image: header, refcount table, refcount
// blocks, L1 table.
func layOut(o CreateOptions) ([]piece, error) {
	h := Header{Version: 3, ClusterBits: defaultClusterBits, Size: o.Size, refcountOrder: defaultOrder, BackingFile: o.Backing, BackingFormat: o.BackingFormat}
	if o.ClusterSize != 0 {
		for h.ClusterBits = minClusterBits; h.ClusterBits < maxClusterBits && h.ClusterSize() < o.ClusterSize; h.ClusterBits++ {
			continue
		}
		if h.ClusterSize() != o.ClusterSize {
			return nil, refusal("use a power of two from 512 to 2M", "cannot have clusters of %d bytes", o.ClusterSize)
		}
	}
	cs := h.ClusterSize()
	entries := h.l1Needed(o.Size)
	switch {
	case o.Size < 0 || o.Size%disk.SectorSize != 0:
		return nil, refusal("round it up to a multiple of 512", "cannot have a size of %d bytes", o.Size)
	case entries*8 > maxL1Bytes:
		return nil, refusal("use larger clusters", "cannot have %d bytes in clusters of %d", o.Size, cs)
	case o.Backing != "" && o.BackingFormat != "raw" && o.BackingFormat != "qcow2":
		return nil, refusal("say raw or qcow2", "cannot have a backing file of format %q", o.BackingFormat)
	}
	up := func(n, unit int64) int64 { return (n + unit - 1) / unit }
	l1 := max(1, up(entries*8, cs))
	table, blocks := int64(1), int64(1)
	for {
		total := 1 + table + blocks + l1
		b := up(total, 1<<h.blockBits())
		t := up(b*8, cs)
		if b <= blocks && t <= table {
			break
		}
		table, blocks = max(t, table), max(b, blocks)
	}
	h.refOffset, h.refClusters = cs, int(table)
	h.l1Offset, h.l1Entries = (1+table+blocks)*cs, int(entries)
	head, err := h.encode()
	if err != nil {
		return nil, err
	}
	refs, counts := make([]byte, 8*blocks), make([]byte, blocks*cs)
	for i := range blocks {
		binary.BigEndian.PutUint64(refs[8*i:], uint64((1+table+i)*cs))
	}
	for i := range 1 + table + blocks + l1 {
		setRefcountAt(counts, i, h.refcountOrder, 1)
	}
	return []piece{{0, head}, {h.refOffset, refs}, {(1 + table) * cs, counts}, {h.l1Offset, make([]byte, l1*cs)}}, nil
}

// encode lays out the header with its extensions and the backing file's name.
func (h *Header) encode() ([]byte, error) {
	be := binary.BigEndian
	b := make([]byte, headerSize, h.ClusterSize())
	copy(b, Magic)
	be.PutUint32(b[offVersion:], uint32(h.Version))
	be.PutUint32(b[offClusterBits:], uint32(h.ClusterBits))
	be.PutUint64(b[offSize:], uint64(h.Size))
	be.PutUint32(b[offL1Size:], uint32(h.l1Entries))
	be.PutUint64(b[offL1Offset:], uint64(h.l1Offset))
	be.PutUint64(b[offRefOffset:], uint64(h.refOffset))
	be.PutUint32(b[offRefClusters:], uint32(h.refClusters))
	be.PutUint32(b[offRefcountOrder:], uint32(h.refcountOrder))
	be.PutUint32(b[offHeaderLength:], headerSize)
	if h.BackingFile != "" {
		b = be.AppendUint32(b, extensionBackingFormat)
		b = be.AppendUint32(b, uint32(len(h.BackingFormat)))
		b = append(b, h.BackingFormat...)
		for len(b)%8 != 0 {
			b = append(b, 0)
		}
	}
	b = be.AppendUint64(b, extensionEnd)
	if h.BackingFile != "" {
		be.PutUint64(b[offBackingOffset:], uint64(len(b)))
		be.PutUint32(b[offBackingSize:], uint32(len(h.BackingFile)))
		b = append(b, h.BackingFile...)
	}
	if len(h.BackingFile) > maxBackingName || int64(len(b)) > h.ClusterSize() {
		return nil, refusal("use a shorter path, or one relative to the image", "cannot hold the name of its backing file, %d bytes", len(h.BackingFile))
	}
	return b, nil
}
