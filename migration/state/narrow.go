package state

import "fmt"

// narrow takes numbers and arrays out of a message, which has them wider than
// they are, and remembers the first that does not fit.
type narrow struct{ err error }

func (n *narrow) failed(format string, args ...any) {
	if n.err == nil {
		n.err = fmt.Errorf(format, args...)
	}
}

func (n *narrow) u8(name string, v uint32) uint8 {
	if v > 0xff {
		n.failed("%s is %#x, wider than 8 bits", name, v)
	}
	return uint8(v)
}

func (n *narrow) u16(name string, v uint32) uint16 {
	if v > 0xffff {
		n.failed("%s is %#x, wider than 16 bits", name, v)
	}
	return uint16(v)
}

// fill copies src, which must be as long as dst.
func (n *narrow) fill(name string, dst, src []byte) {
	if len(src) != len(dst) {
		n.failed("%s has %d bytes, want %d", name, len(src), len(dst))
		return
	}
	copy(dst, src)
}
