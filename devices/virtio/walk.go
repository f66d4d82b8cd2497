package virtio

import (
	"encoding/binary"

	"ditto.vm/memory"
)

// descriptor is a copy of one entry of a descriptor table: le64 addr, le32
// len, le16 flags, le16 next (virtio 1.2 2.7.5).
type descriptor struct {
	addr  memory.GPA
	len   uint32
	flags uint16
	next  uint16
}

// readDescriptor copies entry i of the table, each byte once.
func readDescriptor(table []byte, i int) descriptor {
	entry := table[i*descSize:][:descSize:descSize]
	addr := binary.LittleEndian.Uint64(entry)
	rest := binary.LittleEndian.Uint64(entry[8:])
	return descriptor{memory.GPA(addr), uint32(rest), uint16(rest >> 32), uint16(rest >> 48)}
}

// walk fills c with the chain that starts at head. It stops the queue and
// returns false when the chain is malformed. Every step counts against
// MaxChainLength, so loops end.
func (q *Queue) walk(c *Chain, head uint16) bool {
	table, entries, i := q.desc, int(q.size), int(head)
	inIndirect := false
	for steps := 1; ; steps++ {
		if i >= entries {
			q.breach("descriptor %d of %d", i, entries)
			return false
		}
		if steps > MaxChainLength {
			q.breach("chain of more than %d descriptors", MaxChainLength)
			return false
		}
		d := readDescriptor(table, i)
		if d.flags&descIndirect != 0 {
			if table = q.indirectTable(d, inIndirect); table == nil {
				return false
			}
			entries, i, inIndirect = len(table)/descSize, 0, true
			continue
		}
		if !q.addBuffer(c, d) {
			return false
		}
		if d.flags&descNext == 0 {
			return true
		}
		i = int(d.next)
	}
}

// indirectTable returns the table that d points to, or nil after a failure
// (virtio 1.2 2.7.5.3).
func (q *Queue) indirectTable(d descriptor, nested bool) []byte {
	switch {
	case !q.indirect:
		q.breach("indirect descriptor without the feature")
	case nested:
		q.breach("indirect descriptor inside an indirect table")
	case d.flags&descNext != 0:
		q.breach("indirect descriptor with a next one")
	case d.len == 0 || d.len%descSize != 0 || d.len > MaxChainLength*descSize:
		q.breach("indirect table of %d bytes", d.len)
	default:
		table, err := q.mem.View(d.addr, uint64(d.len))
		if err == nil {
			return table
		}
		q.breach("indirect table: %v", err)
	}
	return nil
}

// addBuffer validates one descriptor and appends its memory to c.
func (q *Queue) addBuffer(c *Chain, d descriptor) bool {
	n := uint64(d.len)
	if n == 0 {
		q.breach("buffer of no bytes at %s", d.addr)
		return false
	}
	if c.ReadableBytes+c.WritableBytes+n > q.maxBytes {
		q.breach("chain of more than %d bytes", q.maxBytes)
		return false
	}
	data, err := q.mem.View(d.addr, n)
	if err != nil {
		q.breach("buffer: %v", err)
		return false
	}
	if d.flags&descWrite != 0 {
		c.Writable = append(c.Writable, Buffer{d.addr, data})
		c.WritableBytes += n
		return true
	}
	if len(c.Writable) > 0 {
		q.breach("readable buffer after a writable one")
		return false
	}
	c.Readable = append(c.Readable, Buffer{d.addr, data})
	c.ReadableBytes += n
	return true
}
