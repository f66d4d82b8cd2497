package index

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"

	"ditto.vm/images/layer"
)

// ErrBusy says that another process builds the same index.
var ErrBusy = errors.New("the index is being built by another process")

// journal keeps hashed chunks beside the index that is being built, so that an
// interrupted build goes on where it was. It is a header that names the layer
// and then one record for each chunk that is not zero:
//
//	0   chunk number              u32
//	4   blocks that are not zero  u32
//	8   XXH3-64 of the rest and of the eight bytes before
//	16  bitmap of the blocks      128 bytes
//	144 digests                   16 bytes each
//	... XXH3-64 of the blocks     8 bytes each
//
// A record that is cut off or altered ends the journal: what follows is written
// anew. It is never synced, since losing it costs only time.
type journal struct {
	f    *os.File
	w    *bufio.Writer
	next int64 // first chunk that is not in it
}

const (
	journalSuffix     = ".partial"
	journalMagic      = "DITTOIDJ"
	journalVersion    = 1
	journalHeaderSize = 8 + 4 + 4 + stampSize + 8
	recordHead        = 16
	bitmapSize        = layer.ChunkBlocks / 8
)

// openJournal opens the journal beside path for this process alone, and calls
// replay with each chunk that an earlier build of the same layer left in it.
func openJournal(path string, stamp layer.Stamp, replay func(*chunk) error) (*journal, error) {
	f, err := os.OpenFile(path+journalSuffix, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrBusy
		}
		return nil, errors.Join(err, f.Close())
	}
	j := &journal{f: f}
	if err := j.load(stamp, replay); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return j, nil
}

// load replays what fits the stamp and cuts off the rest.
func (j *journal) load(stamp layer.Stamp, replay func(*chunk) error) error {
	want := encodeJournalHeader(stamp)
	got := make([]byte, len(want))
	r := bufio.NewReaderSize(j.f, 1<<20)
	keep := int64(len(want))
	if _, err := io.ReadFull(r, got); err != nil || string(got) != string(want) {
		if err := j.f.Truncate(0); err != nil {
			return err
		}
		if _, err := j.f.WriteAt(want, 0); err != nil {
			return err
		}
	} else {
		for c := range records(r, j.next) {
			if err := replay(c); err != nil {
				return err
			}
			j.next = c.n + 1
			keep += recordHead + bitmapSize + int64(len(c.digests))*(16+8)
		}
	}
	if err := j.f.Truncate(keep); err != nil {
		return err
	}
	if _, err := j.f.Seek(keep, io.SeekStart); err != nil {
		return err
	}
	j.w = bufio.NewWriterSize(j.f, 1<<20)
	return nil
}

func encodeJournalHeader(stamp layer.Stamp) []byte {
	b := make([]byte, journalHeaderSize)
	copy(b, journalMagic)
	binary.LittleEndian.PutUint32(b[8:], journalVersion)
	binary.LittleEndian.PutUint32(b[12:], layer.ChunkSize)
	putStamp(b[16:], stamp)
	binary.LittleEndian.PutUint64(b[16+stampSize:], xxh3.Hash(b[:16+stampSize]))
	return b
}

// records yields the whole records of a journal in ascending order of chunks
// from next. It ends silently at the first that is not whole. A chunk is valid
// until the next.
func records(r io.Reader, next int64) func(yield func(*chunk) bool) {
	return func(yield func(*chunk) bool) {
		var c chunk
		head := make([]byte, recordHead)
		body := make([]byte, bitmapSize+layer.ChunkBlocks*(16+8))
		for {
			if _, err := io.ReadFull(r, head); err != nil {
				return
			}
			n, count := int64(binary.LittleEndian.Uint32(head)), binary.LittleEndian.Uint32(head[4:])
			if n < next || count == 0 || count > layer.ChunkBlocks {
				return
			}
			b := body[:bitmapSize+count*(16+8)]
			if _, err := io.ReadFull(r, b); err != nil || recordSum(head, b) != binary.LittleEndian.Uint64(head[8:]) {
				return
			}
			if !c.decode(n, int(count), b) || !yield(&c) {
				return
			}
			next = n + 1
		}
	}
}

// recordSum is the checksum of a record.
func recordSum(head, body []byte) uint64 {
	return xxh3.HashSeed(body, binary.LittleEndian.Uint64(head))
}

// append adds a chunk that is not zero.
func (j *journal) append(c *chunk) error {
	head := make([]byte, recordHead, recordHead+bitmapSize+len(c.digests)*(16+8))
	binary.LittleEndian.PutUint32(head, uint32(c.n))
	binary.LittleEndian.PutUint32(head[4:], uint32(len(c.digests)))
	record := c.encode(head)
	binary.LittleEndian.PutUint64(record[8:], recordSum(record, record[recordHead:]))
	if _, err := j.w.Write(record); err != nil {
		return fmt.Errorf("write %s: %w", j.f.Name(), err)
	}
	return nil
}

// keep ends an interrupted build: what was hashed stays for the next.
func (j *journal) keep() error { return errors.Join(j.w.Flush(), j.f.Close()) }

// remove ends a build whose journal is of no more use.
func (j *journal) remove() error { return errors.Join(os.Remove(j.f.Name()), j.f.Close()) }

// chunk is the result of hashing one chunk: a bitmap of the blocks that are not
// zero, and for each of them, in order, both hashes.
type chunk struct {
	n       int64
	bitmap  [layer.ChunkBlocks / 64]uint64
	digests []layer.Digest
	hashes  []uint64
}

// hash fills c from the chunk's bytes; blocks that are missing are zero.
func (c *chunk) hash(n int64, b []byte) {
	c.n, c.digests, c.hashes = n, c.digests[:0], c.hashes[:0]
	clear(c.bitmap[:])
	for i := 0; len(b) >= layer.BlockSize; i, b = i+1, b[layer.BlockSize:] {
		block := b[:layer.BlockSize]
		if layer.IsZero(block) {
			continue
		}
		c.bitmap[i/64] |= 1 << (i % 64)
		c.digests = append(c.digests, layer.Sum(block))
		c.hashes = append(c.hashes, xxh3.Hash(block))
	}
}

// all returns the digests of all the chunk's blocks, for the identity.
func (c *chunk) all() *[layer.ChunkBlocks]layer.Digest {
	var all [layer.ChunkBlocks]layer.Digest
	next := 0
	c.blocks(func(i int) {
		all[i] = c.digests[next]
		next++
	})
	return &all
}

// blocks calls f with each block of the chunk that is not zero.
func (c *chunk) blocks(f func(i int)) {
	for w, word := range c.bitmap {
		for ; word != 0; word &= word - 1 {
			f(64*w + bits.TrailingZeros64(word))
		}
	}
}

// encode appends bitmap, digests and hashes to b.
func (c *chunk) encode(b []byte) []byte {
	for _, w := range c.bitmap {
		b = binary.LittleEndian.AppendUint64(b, w)
	}
	for i := range c.digests {
		b = append(b, c.digests[i][:]...)
	}
	for _, h := range c.hashes {
		b = binary.LittleEndian.AppendUint64(b, h)
	}
	return b
}

// decode reads what encode wrote and reports whether it is consistent.
func (c *chunk) decode(n int64, count int, b []byte) bool {
	c.n, c.digests, c.hashes = n, c.digests[:0], c.hashes[:0]
	ones := 0
	for i := range c.bitmap {
		c.bitmap[i] = binary.LittleEndian.Uint64(b[8*i:])
		ones += bits.OnesCount64(c.bitmap[i])
	}
	b = b[bitmapSize:]
	for range count {
		c.digests = append(c.digests, layer.Digest(b[:16]))
		b = b[16:]
	}
	for i := range count {
		c.hashes = append(c.hashes, binary.LittleEndian.Uint64(b[8*i:]))
	}
	return ones == count
}
