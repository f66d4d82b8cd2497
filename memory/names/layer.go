package names

import (
	"io"
	"iter"
)

// BlockSize is the unit of naming on disk: a page of guest memory, in bytes.
const BlockSize = 4096

// LayerID numbers a layer within one [Table], in the order of adding. At most
// 4096 layers fit.
type LayerID uint16

// Layer is a disk layer, or a file that was loaded, whose blocks can name pages.
type Layer struct {
	// Title is for people: the path it was opened by.
	Title string
	// Size in bytes. Only whole blocks name pages.
	Size int64
	// Immutable says that nobody writes the layer while the VM runs.
	Immutable bool
	// Source reads what a guest would read from the layer, at any time and
	// from any goroutine.
	Source io.ReaderAt
	// Index finds blocks by content, nil for none. Of a layer that is not
	// immutable it is a hint: blocks are read and compared.
	Index Index
}

// Index finds blocks of a layer by content; see images/index for one. All its
// methods may be called from any goroutine.
type Index interface {
	// MayHold reports whether the layer may hold a block with this XXH3-64:
	// false is certain.
	MayHold(xxh3 uint64) bool
	// Blocks yields the blocks whose BLAKE3, cut to 16 bytes, is digest.
	Blocks(digest [16]byte) iter.Seq[uint64]
	// Digest returns the digest of a block. Blocks of zeros have none.
	Digest(block uint64) (digest [16]byte, ok bool)
}
