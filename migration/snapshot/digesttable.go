package snapshot

import (
	"fmt"
	"io"
	"slices"
	"sync/atomic"
)

// partSize is the size of a part of the digests: those of 16 MiB of pages.
const (
	partSize    = 64 << 10
	partDigests = partSize / digestSize
)

// partsOf returns in how many parts so many digests are.
func partsOf(digests uint64) uint64 { return (digests + partDigests - 1) / partDigests }

// digestTable fetches digests from the tail of a page map: first those of the
// runs of blocks, then those of the slots. Its methods may be called from any
// goroutine.
type digestTable struct {
	file      io.ReaderAt
	offset    int64 // of the first
	blockRuns uint64
	count     uint64   // of all
	proofs    []Digest // of the parts
	parts     []atomic.Pointer[[]Digest]
}

func newDigestTable(proofs []Digest, c mapCounts) digestTable {
	return digestTable{
		offset: int64(headSize(c)), blockRuns: c.blockRuns, count: c.blockRuns + c.slots,
		proofs: proofs, parts: make([]atomic.Pointer[[]Digest], len(proofs)),
	}
}

// blockDigest returns the digest of the run of blocks at a place among the runs.
func (p *pageMap) blockDigest(run int) (Digest, error) {
	i, ok := slices.BinarySearch(p.blocks, uint32(run))
	if !ok {
		return Digest{}, formatError("page map: run %d is not of blocks", run)
	}
	part, err := p.part(uint64(i) / partDigests)
	if err != nil {
		return Digest{}, err
	}
	return part[i%partDigests], nil
}

// slotDigest returns the digest of the page in a slot.
func (p *pageMap) slotDigest(slot uint64) (Digest, error) {
	i := p.table.blockRuns + slot
	part, err := p.part(i / partDigests)
	if err != nil {
		return Digest{}, err
	}
	return part[i%partDigests], nil
}

// part returns a part of the digests, proven.
func (p *pageMap) part(n uint64) ([]Digest, error) {
	t := &p.table
	if got := t.parts[n].Load(); got != nil {
		return *got, nil
	}
	first := n * partDigests
	b := make([]byte, min(partDigests, t.count-first)*digestSize)
	if err := readFull(t.file, b, t.offset+int64(n)*partSize); err != nil {
		return nil, fmt.Errorf("%s: %w", PageMapName, err)
	}
	if digestOf(b) != t.proofs[n] {
		return nil, formatError("page map: its digests were altered, from %d on", first)
	}
	part := digests(b)
	for i, d := range part {
		at := first + uint64(i)
		if at >= t.blockRuns && p.isUsed(at-t.blockRuns) == (d == Digest{}) {
			return nil, formatError("page map: slot %d: digest %s, used %v", at-t.blockRuns, d, p.isUsed(at-t.blockRuns))
		}
	}
	t.parts[n].Store(&part)
	return part, nil
}

// all returns all digests of slots.
func (p *pageMap) all() ([]Digest, error) {
	all := make([]Digest, 0, p.table.count)
	for n := range uint64(len(p.table.proofs)) {
		part, err := p.part(n)
		if err != nil {
			return nil, err
		}
		all = append(all, part...)
	}
	return all[p.table.blockRuns:], nil
}
