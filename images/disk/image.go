package disk

import (
	"fmt"
	"strings"
	"time"
)

// SectorSize is the unit of disk sizes and offsets, in bytes.
const SectorSize = 512

// Image is a disk or one layer of it. Its methods may be called from any
// goroutine and wait for the I/O.
type Image interface {
	// ReadAtv fills bufs, in order, from offset: all of them or an error.
	ReadAtv(bufs [][]byte, offset int64) error
	// WriteAtv writes bufs, in order, at offset: all of them or an error.
	WriteAtv(bufs [][]byte, offset int64) error
	// Flush returns when everything written before is on stable storage.
	Flush() error
	// Discard says that the content of [offset, offset+n) is not needed. It
	// may do nothing.
	Discard(offset, n int64) error
	// WriteZeroes makes [offset, offset+n) read as zeros. unmap allows it to
	// give the storage back.
	WriteZeroes(offset, n int64, unmap bool) error
	// Size is the length in bytes, a multiple of SectorSize.
	Size() int64
	// BlockSize is the logical block size: what requests are multiples of.
	BlockSize() int
	// ReadOnly reports that writes fail.
	ReadOnly() bool
	// Identity tells this image from all others on this host.
	Identity() Identity
	// Close gives up the lock and the file.
	Close() error
}

// Identity tells files apart on one host and notices when one was changed
// behind the holder's back. Images on different hosts are compared by digest.
type Identity struct {
	// Device and Inode name the file.
	Device, Inode uint64
	// Size is the length in bytes.
	Size int64
	// Modified is the time of the last change to the content, as the file
	// system says. Of an image that is open for writing it means nothing.
	Modified time.Time
}

// String prints the identity for logs.
func (i Identity) String() string {
	return fmt.Sprintf("%x:%d:%d@%d", i.Device, i.Inode, i.Size, i.Modified.UnixNano())
}

// Cache selects when a write is stable and whether the host caches the disk.
type Cache int

// The cache modes, with QEMU's names and meaning.
const (
	// CacheWriteback uses the host's page cache; what the guest flushes is
	// stable.
	CacheWriteback Cache = iota
	// CacheNone bypasses the host's page cache (O_DIRECT); what the guest
	// flushes is stable.
	CacheNone
	// CacheWritethrough uses the host's page cache for reads; every write is
	// stable when it completes.
	CacheWritethrough
)

var cacheNames = [...]string{"writeback", "none", "writethrough"}

// String returns the flag value: writeback, none or writethrough.
func (c Cache) String() string {
	if c < 0 || int(c) >= len(cacheNames) {
		return fmt.Sprintf("Cache(%d)", int(c))
	}
	return cacheNames[c]
}

// MarshalText implements encoding.TextMarshaler.
func (c Cache) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *Cache) UnmarshalText(text []byte) error {
	for i, name := range cacheNames {
		if strings.EqualFold(string(text), name) {
			*c = Cache(i)
			return nil
		}
	}
	return fmt.Errorf("unknown cache mode %q: use writeback, none or writethrough", text)
}
