package layer

import (
	"bytes"
	"encoding/binary"

	"github.com/zeebo/blake3"
)

// Sizes of what identities and indexes are made of.
const (
	// BlockSize is the unit of naming, in bytes: a page of guest memory.
	BlockSize = 4096
	// ChunkBlocks is the number of blocks below one leaf of the tree.
	ChunkBlocks = 1024
	// ChunkSize is the unit of hashing and of resuming, in bytes.
	ChunkSize = ChunkBlocks * BlockSize
)

// Digest identifies the content of a block: 16 bytes of BLAKE3, or all zeros
// for a block of zeros. It is an alias so that other packages can say [16]byte.
type Digest = [16]byte

var zeroBlock [BlockSize]byte

// IsZero reports whether b, at most a block, is all zeros.
func IsZero(b []byte) bool { return bytes.Equal(b, zeroBlock[:len(b)]) }

// Sum returns the digest of a block that is known not to be zero.
func Sum(block []byte) Digest {
	full := blake3.Sum256(block)
	return Digest(full[:16])
}

// contentLabel separates this use of BLAKE3 from every other.
const contentLabel = "ditto layer content 1\x00"

// ContentHasher derives a layer's identity from its blocks' digests, chunk after
// chunk.
type ContentHasher struct {
	h        *blake3.Hasher
	size     int64
	chunks   int64 // given so far
	zeroLeaf Digest
}

// NewContentHasher starts the identity of a layer of size bytes.
func NewContentHasher(size int64) *ContentHasher {
	h := blake3.New()
	_, _ = h.WriteString(contentLabel)
	_, _ = h.Write(binary.LittleEndian.AppendUint64(nil, uint64(size)))
	var zeros [ChunkBlocks]Digest
	return &ContentHasher{h: h, size: size, zeroLeaf: leaf(&zeros)}
}

// leaf hashes the digests of one chunk.
func leaf(digests *[ChunkBlocks]Digest) Digest {
	var flat [ChunkBlocks * 16]byte
	for i := range digests {
		copy(flat[16*i:], digests[i][:])
	}
	return Sum(flat[:])
}

// Chunk adds a chunk. Chunks come in ascending order; those left out are zero.
func (c *ContentHasher) Chunk(n int64, digests *[ChunkBlocks]Digest) {
	c.skipTo(n)
	l := leaf(digests)
	_, _ = c.h.Write(l[:])
	c.chunks++
}

// skipTo adds zero chunks up to but without the nth.
func (c *ContentHasher) skipTo(n int64) {
	for ; c.chunks < n; c.chunks++ {
		_, _ = c.h.Write(c.zeroLeaf[:])
	}
}

// ID ends the layer with the bytes after its last whole block, at most a block
// less one, and returns its identity.
func (c *ContentHasher) ID(tail []byte) ID {
	c.skipTo((c.size/BlockSize + ChunkBlocks - 1) / ChunkBlocks)
	if len(tail) > 0 {
		d := Sum(tail)
		_, _ = c.h.Write(d[:])
	}
	var id ID
	copy(id[:], c.h.Sum(nil))
	return id.withVersion(versionContent)
}
