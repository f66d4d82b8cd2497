package chain

import (
	"fmt"

	"ditto.vm/images/qcow2"
)

// Extent is a range of the disk whose bytes are in one place.
type Extent struct {
	// Layer holds the bytes; nil if they are zeros because no layer does.
	Layer *Layer
	// Kind is qcow2.Data, Zero or Compressed.
	Kind qcow2.Kind
	// Length in bytes.
	Length int64
	// Host is where they begin in the layer's file, of Data.
	Host int64

	inPlace bool
}

// Map tells where the disk's bytes at offset are, for n bytes at most; the
// next range may be of the same kind. It waits for metadata.
func (c *Chain) Map(offset, n int64) (Extent, error) {
	return c.top().find(offset, n)
}

// Map is [Chain.Map] of the disk that the layer and what is below it make up.
func (l *Layer) Map(offset, n int64) (Extent, error) { return l.find(offset, n) }

// find looks through the layer and those below.
func (l *Layer) find(offset, n int64) (Extent, error) {
	if offset < 0 || n <= 0 || offset > l.Size()-n {
		return Extent{}, fmt.Errorf("%d bytes at %#x are not in the disk of %d bytes", n, offset, l.Size())
	}
	e, _, err := l.search(offset, n, true)
	return e, err
}

// search is find for what is known to be in the disk; without wait ok is false
// if metadata is not in memory.
func (l *Layer) search(offset, n int64, wait bool) (out Extent, ok bool, err error) {
	for at := l; at != nil; at = at.below {
		e, ok, err := at.lookup(offset, n, wait)
		if !ok {
			return out, false, err
		}
		n = e.Length
		if e.Kind != qcow2.Unallocated {
			return Extent{Layer: at, Kind: e.Kind, Length: n, Host: e.Host, inPlace: at == l && e.InPlace}, true, nil
		}
	}
	return Extent{Kind: qcow2.Zero, Length: n}, true, nil
}
