package storage

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
)

// recordSize is the length of a record and its alignment on the disk: a page,
// so that no cache on the way writes half of one.
const recordSize = 4096

// ringSlots is how many slots are written again and again, by the records with
// odd numbers. Those with even numbers follow them, each in a slot of its own,
// so that both overwriting and growing are put to the test.
const ringSlots = 16

// record is what is written under a sequence number: nothing about it is left
// to chance, so that every byte can be checked.
func record(seed uint64, disk int, seq uint64) []byte {
	b := make([]byte, recordSize)
	copy(b, "ditto-record")
	binary.LittleEndian.PutUint32(b[12:], uint32(disk))
	binary.LittleEndian.PutUint64(b[16:], seq)
	rng := rand.NewPCG(seed, uint64(disk)<<48|seq)
	for i := 24; i < recordSize; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], rng.Uint64())
	}
	return b
}

// sequence returns the sequence number that a record claims to have.
func sequence(b []byte) uint64 { return binary.LittleEndian.Uint64(b[16:]) }

// checksum is what an acknowledgement says of its last record.
func checksum(b []byte) uint32 { return crc32.ChecksumIEEE(b) }

// offset is where the record with a sequence number lies, counted from 1.
func offset(seq uint64) int64 {
	if seq%2 == 1 {
		return int64(seq/2%ringSlots) * recordSize
	}
	return int64(ringSlots+seq/2) * recordSize
}

// lost returns what is missing of the records up to acked in content.
func lost(content []byte, seed uint64, disk int, acked uint64) []string {
	var missing []string
	for seq := uint64(1); seq <= acked; seq++ {
		rewritten := seq%2 == 1 && seq+2*ringSlots <= acked
		if rewritten {
			continue
		}
		at := offset(seq)
		if at+recordSize > int64(len(content)) {
			missing = append(missing, fmt.Sprintf("record %d: behind the end", seq))
			continue
		}
		found := content[at:][:recordSize]
		if bytes.Equal(found, record(seed, disk, seq)) {
			continue
		}
		// A later record may be there already: written, not yet acknowledged.
		if later := sequence(found); later > acked && offset(later) == at && bytes.Equal(found, record(seed, disk, later)) {
			continue
		}
		missing = append(missing, fmt.Sprintf("record %d: % x... at %d", seq, found[:24], at))
	}
	return missing
}
