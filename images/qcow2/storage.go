package qcow2

import "encoding/binary"

// Storage is the file that an image is in; a [disk.Raw] that was opened as a
// container is one. Reads beyond its end give zeros, writes beyond make it
// longer.
type Storage interface {
	// ReadAtv and WriteAtv move guest data. A write returns before it is
	// stable.
	ReadAtv(bufs [][]byte, offset int64) error
	WriteAtv(bufs [][]byte, offset int64) error
	// ReadBuffered and WriteBuffered move metadata, at any alignment.
	ReadBuffered(p []byte, offset int64) error
	WriteBuffered(p []byte, offset int64) error
	// Flush makes stable what was written before.
	Flush() error
	// Discard says that a range is not needed.
	Discard(offset, n int64) error
	// Length is how long the file is.
	Length() (int64, error)
	// Growable: the file grows when it is written beyond its end, and what
	// was skipped reads as zeros.
	Growable() bool
	ReadOnly() bool
	BlockSize() int
}

// readTable reads n big-endian words.
func readTable(s Storage, offset int64, n int) ([]uint64, error) {
	table := make([]uint64, n)
	buf := make([]byte, min(8*n, 64<<10))
	for i := 0; i < n; {
		k := min(n-i, len(buf)/8)
		if err := s.ReadBuffered(buf[:8*k], offset+8*int64(i)); err != nil {
			return nil, err
		}
		for j := range k {
			table[i+j] = binary.BigEndian.Uint64(buf[8*j:])
		}
		i += k
	}
	return table, nil
}

// writeTable writes big-endian words.
func writeTable(s Storage, table []uint64, offset int64) error {
	b := make([]byte, 0, 8*len(table))
	for _, w := range table {
		b = binary.BigEndian.AppendUint64(b, w)
	}
	return s.WriteBuffered(b, offset)
}

// writeWord writes one big-endian word, which a power cut cannot tear.
func writeWord(s Storage, w uint64, offset int64) error {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], w)
	return s.WriteBuffered(b[:], offset)
}
