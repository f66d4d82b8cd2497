package qcow2

import (
	"bytes"
	"compress/flate"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// ReadAtv fills bufs from offset.
func (f *File) ReadAtv(bufs [][]byte, offset int64) error {
	left := length(bufs)
	if err := f.check(offset, left, false); err != nil {
		return err
	}
	pin := f.Begin()
	defer f.End(pin)
	for left > 0 {
		e, err := f.Map(offset, left)
		if err != nil {
			return err
		}
		if err := f.readExtent(take(bufs, e.Length), offset, e); err != nil {
			return err
		}
		bufs = drop(bufs, e.Length)
		offset, left = offset+e.Length, left-e.Length
	}
	return nil
}

// readExtent fills bufs from an extent of their length.
func (f *File) readExtent(bufs [][]byte, offset int64, e Extent) error {
	switch e.Kind {
	case Data:
		return f.s.ReadAtv(bufs, e.Host)
	case Compressed:
		return f.readCompressed(bufs, offset, e.entry)
	case Unallocated:
		return f.readBacking(bufs, offset)
	}
	zero(bufs)
	return nil
}

// readBacking fills bufs from the backing image, and with zeros beyond it.
func (f *File) readBacking(bufs [][]byte, offset int64) error {
	n := f.backed(offset, length(bufs))
	if n > 0 {
		if err := f.backing.ReadAtv(take(bufs, n), offset); err != nil {
			return err
		}
	}
	zero(drop(bufs, n))
	return nil
}

// backed is how many of the n bytes at offset a backing image covers.
func (f *File) backed(offset, n int64) int64 {
	if f.backing == nil {
		return 0
	}
	return max(0, min(n, f.backing.Size()-offset))
}

// clusterCache keeps the clusters that were decompressed last.
type clusterCache struct {
	mu      sync.Mutex
	entries [4]struct {
		entry uint64
		data  []byte
	}
	next int
}

func (c *clusterCache) get(entry uint64) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		if e.entry == entry {
			return e.data
		}
	}
	return nil
}

func (c *clusterCache) put(entry uint64, data []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.next = (c.next + 1) % len(c.entries)
	c.entries[c.next].entry, c.entries[c.next].data = entry, data
}

// readCompressed fills bufs from a compressed cluster.
func (f *File) readCompressed(bufs [][]byte, offset int64, entry uint64) error {
	data := f.clusters.get(entry)
	if data == nil {
		var err error
		if data, err = f.decompress(entry); err != nil {
			return err
		}
		f.clusters.put(entry, data)
	}
	data = data[offset&(f.h.ClusterSize()-1):]
	for _, b := range bufs {
		data = data[copy(b, data):]
	}
	return nil
}

// decompress reads a compressed cluster. What follows it in its last sector is
// not looked at, and never more than a cluster is made of it.
func (f *File) decompress(entry uint64) ([]byte, error) {
	at, n := f.h.compressedRange(entry)
	packed := make([]byte, n)
	if err := f.s.ReadBuffered(packed, at); err != nil {
		return nil, err
	}
	var r io.Reader
	if f.h.Compression == Zstd {
		z, err := zstd.NewReader(bytes.NewReader(packed), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(8<<20))
		if err != nil {
			return nil, fmt.Errorf("zstd: %w", err)
		}
		defer z.Close()
		r = z
	} else {
		r = flate.NewReader(bytes.NewReader(packed))
	}
	data := make([]byte, f.h.ClusterSize())
	if _, err := io.ReadFull(r, data); err != nil {
		return nil, corrupt("compressed cluster at %#x: %v", at, err)
	}
	return data, nil
}
