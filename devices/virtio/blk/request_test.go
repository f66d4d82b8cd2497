package blk

import (
	"testing"
)

// FuzzParse checks that whatever a header says, the request stays inside the
// disk.
func FuzzParse(f *testing.F) {
	const size = 1 << 20
	f.Add(append(header(typeIn, 0), segment(0, 0, 0)...), uint64(16), uint64(513), false)
	f.Add(append(header(typeOut, size/512-1), segment(0, 0, 0)...), uint64(528), uint64(1), false)
	f.Add(append(header(typeDiscard, 0), segment(1, size/512, 0)...), uint64(32), uint64(1), false)
	f.Add(append(header(typeWriteZeroes, 0), segment(^uint64(0), 0xFFFFFFFF, 1)...), uint64(32), uint64(1), true)
	f.Add(header(typeIn, 8), uint64(16), ^uint64(0)-4094, false)
	f.Add(header(typeOut, 8), ^uint64(0)-4095+16, uint64(1), false)
	f.Add(header(typeGetID, 1<<55), uint64(16), uint64(21), true)
	f.Fuzz(func(t *testing.T, head []byte, readable, writable uint64, readOnly bool) {
		g := geometry{size: size, blockSize: 512, readOnly: readOnly, features: allFeatures, maxErase: maxEraseSectors}
		r, status, err := parse(head, readable, writable, &g)
		if err != nil || status != statusOK {
			return
		}
		if r.offset < 0 || r.length < 0 || r.offset+r.length > size {
			t.Fatalf("%v leaves the disk", r)
		}
		switch r.kind {
		case typeOut, typeDiscard, typeWriteZeroes:
			if readOnly {
				t.Fatalf("%v on a read-only disk", r)
			}
		case typeGetID:
			if r.length > serialSize || uint64(r.length) >= writable {
				t.Fatalf("%v into %d bytes", r, writable)
			}
		}
		if r.kind == typeIn && uint64(r.length) != writable-statusSize {
			t.Fatalf("%v into %d bytes", r, writable)
		}
	})
}
