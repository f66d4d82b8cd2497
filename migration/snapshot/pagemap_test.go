package snapshot

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/zeebo/xxh3"

	"ditto.vm/memory"
)

// TestPageMapRefuses: a page map whose sums are right is refused when what it says
// does not fit together.
func TestPageMapRefuses(t *testing.T) {
	full := func(n int) []Digest {
		all := make([]Digest, n)
		for i := range all {
			all[i][0] = 1
		}
		return all
	}
	zero := func(pages uint64) Run { return Run{Kind: Zero, Pages: pages} }
	for _, test := range []struct {
		want string // "" for a good one
		p    pageMap
	}{
		{"", pageMap{runs: []Run{{Kind: Unique, Pages: 4}, zero(252)}, digests: full(4)}},
		{"another page", pageMap{runs: []Run{{Kind: Unique, Pages: 4}, {Kind: Unique, Pages: 2, Number: 3}, zero(250)}, digests: full(5)}},
		{"slot 4 of 4", pageMap{runs: []Run{{Kind: Unique, Pages: 5}, zero(251)}, digests: full(4)}},
		{"used true", pageMap{runs: []Run{{Kind: Unique, Pages: 4}, zero(252)}, digests: append(full(3), Digest{})}},
		{"used false", pageMap{runs: []Run{{Kind: Unique, Pages: 3}, zero(253)}, digests: full(4)}},
		{"not in its frame", pageMap{
			runs: []Run{{Kind: Unique, Pages: 3}, zero(253)}, digests: append(full(3), Digest{}), framePages: 4,
			frames: []frame{{size: 10, pages: 2}}, pagesSize: 10,
		}},
		{"stand for themselves", pageMap{runs: []Run{{Kind: Page, Pages: 1, Number: 5}, zero(255)}}},
		{"digests of", pageMap{runs: []Run{{Kind: Block, Pages: 1}, zero(255)}}},
		{"it ends at", pageMap{runs: []Run{zero(255)}}},
		{"outside of memory", pageMap{runs: []Run{zero(257)}}},
	} {
		p := test.p
		if p.pagesSize == 0 {
			p.pagesSize = uint64(len(p.digests)) * memory.PageSize
		}
		b, _ := p.encode()
		// The header counts the pages of the runs; sealing says what memory has.
		_, err := readPageMap(sealMap(b))
		if test.want == "" && err != nil || test.want != "" && (!errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%+v: %v, want %q", test.p.runs, err, test.want)
		}
	}
}

// TestAlteredTogether: a page that was altered together with its digest is
// noticed.
func TestAlteredTogether(t *testing.T) {
	_, dir := small(t, None)
	snap, err := Open(dir, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	r, _ := snap.resolve(100)
	at := snap.p.table.offset + int64(snap.p.table.blockRuns+r.Number)*digestSize
	if err := snap.Close(); err != nil {
		t.Fatal(err)
	}
	page := make([]byte, memory.PageSize)
	page[0] = 0xee
	sum := pageDigest(snap.p.seed, page)
	for name, change := range map[string]struct {
		at int64
		b  []byte
	}{PagesName: {int64(r.Number) * memory.PageSize, page}, PageMapName: {at, sum[:]}} {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(change.b, change.at); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	if snap, err = Open(dir, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	defer snap.Close()
	if err := snap.Load(t.Context(), newSpace(t, 1<<20), LoadOptions{}); !errors.Is(err, ErrFormat) {
		t.Errorf("load: %v", err)
	}
	if err := snap.Verify(t.Context(), LoadOptions{}); !errors.Is(err, ErrFormat) {
		t.Errorf("verify: %v", err)
	}
}

// TestHeadAltered: a head whose sums are right is still not the one that the
// manifest is about.
func TestHeadAltered(t *testing.T) {
	_, dir := small(t, None)
	path := filepath.Join(dir, PageMapName)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, c, err := readHeader(b, mapScope{regions: []memory.Range{{Size: 1 << 20}}})
	if err != nil {
		t.Fatal(err)
	}
	head := b[:headSize(c)]
	head[len(head)-1] ^= 1
	sum := xxh3.Hash128(head[headerSize:]).Bytes()
	copy(head[offHeadSum:], sum[:])
	binary.LittleEndian.PutUint64(head[offHeaderSum:], xxh3.Hash(head[:offHeaderSum]))
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, OpenOptions{}); !errors.Is(err, ErrFormat) {
		t.Errorf("open: %v", err)
	}
}
