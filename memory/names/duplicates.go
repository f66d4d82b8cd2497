package names

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"
	"sync/atomic"
	"time"

	"github.com/zeebo/blake3"

	"ditto.vm/memory"
)

// duplicates finds equal pages among those that are left.
//
// Each page is an entry of 8 bytes: the top bits of its hash choose a partition,
// the next 36 stand in the entry, above the page's number. A sorted partition
// has pages of one hash side by side, the lowest first. Their bytes are
// compared.
//
// A guest can make any number of different pages with one XXH3. When a row of
// pages with one hash has more than a few contents, the rest of it goes through
// a second round, by a BLAKE3 whose key nobody knows.
type duplicates struct {
	*passRun
	workers []*worker
	// bases are the numbers of the regions' first pages; pages are numbered
	// in the order of their addresses.
	bases []uint64
	// shift takes a hash to its partition.
	shift   uint
	entries []uint64
	// crowded counts pages that need the second round.
	crowded atomic.Uint64
}

const (
	// numberBits hold the number of a page: a terabyte has 2^28.
	numberBits = 28
	// partitionPages is how large a partition should be: 8 KiB of entries.
	partitionPages = 1024
	maxPartitions  = 1 << 16
	// maxContents bounds how many contents a row of pages with one XXH3 is
	// compared with.
	maxContents = 4
)

func (r *passRun) findDuplicates(ctx context.Context, workers []*worker) error {
	d := &duplicates{passRun: r, workers: workers}
	pages := uint64(0)
	for i := range r.m.regions {
		d.bases = append(d.bases, pages)
		pages += uint64(len(r.m.regions[i].names))
	}
	if err := d.round(ctx, d.compareFew); err != nil {
		return err
	}
	if d.crowded.Load() == 0 {
		return nil
	}
	var key [32]byte
	_, _ = rand.Read(key[:]) // never fails (crypto/rand)
	if err := d.each(ctx, len(d.units), func(w *worker, i int) error { return d.rehash(w, d.units[i], key) }); err != nil {
		return err
	}
	return d.round(ctx, d.compareAll)
}

// each is [passRun.parallel] with the worker, whose time it books.
func (d *duplicates) each(ctx context.Context, n int, do func(w *worker, i int) error) error {
	step := StepDuplicates.index()
	return d.parallel(ctx, n, func(worker, i int) error {
		w, start := d.workers[worker], time.Now()
		err := do(w, i)
		w.time[step] += time.Since(start)
		return err
	})
}

// round compares all pages that are left, whose hashes stand in the map, and
// leaves those that compare puts back.
func (d *duplicates) round(ctx context.Context, compare func(w *worker, row []uint64)) error {
	var left uint64
	for _, words := range d.left {
		for _, word := range words {
			left += uint64(bits.OnesCount64(word))
		}
	}
	partitions := min(max(1, 1<<bits.Len64(left/partitionPages)), maxPartitions)
	d.shift = uint(64 - bits.TrailingZeros(uint(partitions)))
	// next[i] is first the size of partition i, then where its next entry goes,
	// and in the end where the partition after it begins.
	next := make([]uint32, partitions)
	err := d.each(ctx, len(d.units), func(_ *worker, i int) error {
		d.eachLeft(d.units[i], func(_ int, n *Name) { atomic.AddUint32(&next[uint64(*n)>>d.shift], 1) })
		return nil
	})
	if err != nil {
		return err
	}
	sum := uint32(0)
	for i, size := range next {
		next[i] = sum
		sum += size
	}
	d.entries = slices.Grow(d.entries[:0], int(left))[:left]
	if err := d.each(ctx, len(d.units), func(_ *worker, i int) error { d.deal(d.units[i], next); return nil }); err != nil {
		return err
	}
	return d.each(ctx, partitions, func(w *worker, i int) error {
		first := uint32(0)
		if i > 0 {
			first = next[i-1]
		}
		d.partition(w, d.entries[first:next[i]], compare)
		return nil
	})
}

// eachLeft calls f for the pages of a unit that are left, with the place of
// their hash.
func (d *duplicates) eachLeft(u unit, f func(i int, hash *Name)) {
	r := &d.m.regions[u.region]
	for at := u.first / 64; at < (u.first+u.n+63)/64; at++ {
		for word := d.left[u.region][at]; word != 0; word &= word - 1 {
			i := at*64 + bits.TrailingZeros64(word)
			f(i, &r.names[i])
		}
	}
}

// deal makes the entries of a unit's pages, which from then on count as unique.
func (d *duplicates) deal(u unit, next []uint32) {
	// With one partition the shift is 64, and the whole hash is above the number.
	drop := 64 - d.shift
	d.eachLeft(u, func(i int, n *Name) {
		hash := uint64(*n)
		*n = 0
		place := atomic.AddUint32(&next[hash>>d.shift], 1) - 1
		d.entries[place] = hash<<drop>>numberBits<<numberBits | (d.bases[u.region] + uint64(i))
	})
	clear(d.left[u.region][u.first/64 : (u.first+u.n+63)/64])
}

// partition sorts entries and compares each row with one hash.
func (d *duplicates) partition(w *worker, entries []uint64, compare func(w *worker, row []uint64)) {
	slices.Sort(entries)
	for len(entries) > 1 {
		n := 1
		for n < len(entries) && entries[n]>>numberBits == entries[0]>>numberBits {
			n++
		}
		if n > 1 {
			compare(w, entries[:n])
		}
		entries = entries[n:]
	}
}

// find returns the region of an entry's page and its place there.
func (d *duplicates) find(entry uint64) (region int, i uint64) {
	n := entry & (1<<numberBits - 1)
	for region = len(d.bases) - 1; n < d.bases[region]; region-- {
	}
	return region, n - d.bases[region]
}

// page returns the content of an entry's page.
func (d *duplicates) page(entry uint64) []byte {
	region, i := d.find(entry)
	mem, err := d.Space.View(d.m.regions[region].Start+memory.GPA(i*memory.PageSize), memory.PageSize)
	if err != nil {
		panic(fmt.Sprintf("page %d of region %d: %v", i, region, err))
	}
	return mem
}

// nameAfter names an entry's page after a lower one.
func (d *duplicates) nameAfter(w *worker, entry, lower uint64) {
	region, i := d.find(entry)
	lowRegion, low := d.find(lower)
	gfn := d.m.regions[lowRegion].Start.GFN() + memory.GFN(low)
	d.m.regions[region].names[i] = OfPage(uint64(gfn)) | d.proven
	w.named[StepDuplicates.index()]++
}

// compareFew compares a row of pages in ascending order. When it has too many
// contents, those that were found and all pages that follow are left for the
// next round.
func (d *duplicates) compareFew(w *worker, row []uint64) {
	var contents [maxContents]uint64
	found := 0
	for i, entry := range row {
		switch {
		case d.same(w, entry, contents[:found]):
		case found < maxContents:
			contents[found] = entry
			found++
		default:
			d.putBack(contents[:])
			d.putBack(row[i:])
			return
		}
	}
}

// compareAll does the same for hashes that nobody can make collide.
func (d *duplicates) compareAll(w *worker, row []uint64) {
	var contents []uint64
	for _, entry := range row {
		if !d.same(w, entry, contents) {
			contents = append(contents, entry)
		}
	}
}

// same names an entry's page after the first of the others that is equal, and
// reports whether there is one.
func (d *duplicates) same(w *worker, entry uint64, others []uint64) bool {
	page := d.page(entry)
	for _, other := range others {
		w.compared++
		if bytes.Equal(page, d.page(other)) {
			d.nameAfter(w, entry, other)
			return true
		}
	}
	return false
}

// putBack leaves pages for the next round.
func (d *duplicates) putBack(entries []uint64) {
	d.crowded.Add(uint64(len(entries)))
	for _, entry := range entries {
		region, i := d.find(entry)
		atomic.OrUint64(&d.left[region][i/64], 1<<(i%64))
	}
}

// rehash replaces the hashes of a unit's pages that are left.
func (d *duplicates) rehash(w *worker, u unit, key [32]byte) error {
	h, err := blake3.NewKeyed(key[:])
	if err != nil {
		return err
	}
	var sum [32]byte
	d.eachLeft(u, func(i int, n *Name) {
		w.digested++
		h.Reset()
		_, _ = h.Write(d.page(d.bases[u.region] + uint64(i)))
		h.Sum(sum[:0])
		*n = Name(binary.LittleEndian.Uint64(sum[:]))
	})
	return nil
}
