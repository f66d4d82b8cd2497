package snapshot

import (
	"encoding/hex"
	"fmt"

	"github.com/zeebo/blake3"
	"github.com/zeebo/xxh3"
)

// Digest is the first 16 bytes of a BLAKE3, or of a page an XXH3-128.
type Digest [16]byte

// ID is the identity of a snapshot: the digest over its manifest, which holds
// the digests of all the rest.
type ID = Digest

// digestOf returns the digest of bytes.
func digestOf(b []byte) Digest {
	sum := blake3.Sum256(b)
	return Digest(sum[:16])
}

// pageDigest returns the digest of a page, or of the digests of blocks: XXH3-128,
// which keeps up with memory. The seed is drawn for each snapshot, and no guest
// reads it: whoever cannot know it cannot make two pages of one digest.
func pageDigest(seed uint64, page []byte) Digest { return xxh3.Hash128Seed(page, seed).Bytes() }

// digestOfAll returns the digest over digests, one after the other.
func digestOfAll(all []Digest) Digest {
	flat := make([]byte, 0, digestSize*len(all))
	for _, d := range all {
		flat = append(flat, d[:]...)
	}
	return digestOf(flat)
}

// String returns 32 hexadecimal digits.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// MarshalText implements encoding.TextMarshaler.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler. It accepts what String
// returns and nothing else.
func (d *Digest) UnmarshalText(text []byte) error {
	var parsed Digest
	if len(text) == 2*len(parsed) {
		if _, err := hex.Decode(parsed[:], text); err == nil && parsed.String() == string(text) {
			*d = parsed
			return nil
		}
	}
	return fmt.Errorf("digest %q: want %d hexadecimal digits", text, 2*len(parsed))
}
