package index

import "encoding/binary"

// The filter is a split-block Bloom filter: a key chooses one row of 32 bytes,
// a cache line at most, and one bit in each of its eight words. With 12 bits an
// entry one absent page in some 150 passes.
const (
	filterRowSize  = 32
	filterBitsEach = 12
)

// filterSalts spread a key over the words of its row; any odd numbers do, and
// these are part of the format.
var filterSalts = [8]uint32{0x9e3779b1, 0x85ebca77, 0xc2b2ae3d, 0x27d4eb2f, 0x165667b1, 0xd3a2646d, 0xfd7046c5, 0xb55a4f09}

// filterRowsFor returns how many rows hold the keys of so many entries.
func filterRowsFor(entries uint64) uint32 {
	return uint32((entries*filterBitsEach+8*filterRowSize-1)/(8*filterRowSize)) | boolToOne(entries == 0)
}

func boolToOne(b bool) uint32 {
	if b {
		return 1
	}
	return 0
}

// filterRow returns the offset of a key's row.
func filterRow(rows uint32, key uint64) int {
	return int((key>>32)*uint64(rows)>>32) * filterRowSize
}

// filterAdd adds a key.
func filterAdd(filter []byte, rows uint32, key uint64) {
	row := filter[filterRow(rows, key):][:filterRowSize]
	for i, salt := range filterSalts {
		w := row[4*i:]
		bit := uint32(1) << (uint32(key) * salt >> 27)
		binary.LittleEndian.PutUint32(w, binary.LittleEndian.Uint32(w)|bit)
	}
}

// filterHas reports whether a key may have been added.
func filterHas(filter []byte, rows uint32, key uint64) bool {
	row := filter[filterRow(rows, key):][:filterRowSize]
	for i, salt := range filterSalts {
		bit := uint32(1) << (uint32(key) * salt >> 27)
		if binary.LittleEndian.Uint32(row[4*i:])&bit == 0 {
			return false
		}
	}
	return true
}
