package snapshot

import (
	"encoding/hex"
	"fmt"

	"github.com/zeebo/blake3"
)

// Digest is the first 16 bytes of a BLAKE3.
type Digest [16]byte

// ID is the identity of a snapshot: the digest over its manifest, which holds
// the digests of all the rest.
type ID = Digest

// digestOf returns the digest of bytes.
func digestOf(b []byte) Digest {
	sum := blake3.Sum256(b)
	return Digest(sum[:16])
}

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
