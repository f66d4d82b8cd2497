package layer

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
)

// ID is the identity of a layer. The zero value names no layer.
type ID [16]byte

// Kind says where an identity comes from.
type Kind int

// The kinds.
const (
	Unknown Kind = iota
	// Content: derived from the bytes of an immutable layer.
	Content
	// Written: drawn at random for a layer that is being written, or was.
	Written
)

// UUID versions (RFC 9562 5.4 and 5.8).
const (
	versionRandom  = 4
	versionContent = 8
)

// NewWritten draws the identity of a layer that is opened for writing.
func NewWritten() ID {
	var id ID
	_, _ = rand.Read(id[:]) // never fails (crypto/rand)
	return id.withVersion(versionRandom)
}

// withVersion sets the version and variant bits of a UUID.
func (id ID) withVersion(v byte) ID {
	id[6] = id[6]&0x0f | v<<4
	id[8] = id[8]&0x3f | 0x80
	return id
}

// Kind returns the identity's kind, Unknown when it is none of ours.
func (id ID) Kind() Kind {
	if id[8]&0xc0 != 0x80 {
		return Unknown
	}
	switch id[6] >> 4 {
	case versionContent:
		return Content
	case versionRandom:
		return Written
	}
	return Unknown
}

// String returns the UUID's text form.
func (id ID) String() string {
	h := hex.EncodeToString(id[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// MarshalText implements encoding.TextMarshaler.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler. It accepts what String
// returns and nothing else.
func (id *ID) UnmarshalText(text []byte) error {
	var parsed ID
	if len(text) == 36 {
		digits := append(append(append(append(append([]byte(nil), text[:8]...), text[9:13]...), text[14:18]...), text[19:23]...), text[24:]...)
		if _, err := hex.Decode(parsed[:], digits); err == nil && parsed.String() == string(text) && parsed.Kind() != Unknown {
			*id = parsed
			return nil
		}
	}
	return fmt.Errorf("layer identity %q: want a lower-case UUID of version 4 or 8", text)
}
