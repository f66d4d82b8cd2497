package live

import (
	"bytes"

	"github.com/zeebo/blake3"
	"github.com/zeebo/xxh3"

	"ditto.vm/memory"
	"ditto.vm/migration/wire"
)

// digester makes the digests by which pages are proven.
type digester struct {
	kind wire.Digests
	seed uint64
}

// sum returns the digest of a page, or of more of them.
func (d digester) sum(b []byte) [wire.DigestSize]byte {
	if d.kind == wire.DigestBLAKE3 {
		long := blake3.Sum256(b)
		return [wire.DigestSize]byte(long[:])
	}
	return xxh3.Hash128Seed(b, d.seed).Bytes()
}

var zeros [memory.PageSize]byte

// isZero reports whether a page is all zeros.
func isZero(page []byte) bool { return bytes.Equal(page, zeros[:]) }
