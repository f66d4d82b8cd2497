package names

import (
	"bytes"
	"cmp"
	"io"
	"slices"

	"ditto.vm/memory"
)

// proof is one comparison of pages with their blocks.
//
//	arm the pages                          (the caller)
//	provisional -> proving                 begin
//	read the blocks, compare the bytes     compare
//	proving -> proven, or nothing          end
//
// A page that is written after it was armed is reported, and then loses its
// name; one whose block changes after proving was set loses proving, and with it
// the proof. Both come before the comparison, so what is proven is true until
// the one or the other says otherwise.
type proof struct {
	table  *Table
	space  *memory.Space
	buf    []byte // of blocks read at once, made when it is needed
	claims []claim
	read   int64 // bytes read so far
	// wanted tells which layers matter; nil means all.
	wanted func(LayerID) bool
}

// claim is a page that is being proven.
type claim struct {
	page uint32
	word word // with proving
}

func newProof(t *Table, s *memory.Space) *proof {
	return &proof{table: t, space: s}
}

// proofBuffer bounds one read of a layer, in bytes.
const proofBuffer = 256 << 10

// provisional calls f with the maximal runs of pages in r that have names to
// prove, until f fails.
func (t *Table) provisional(r memory.Range, f func(run memory.Range) error) error {
	var run memory.Range
	var err error
	t.eachPage(r, func(page uint32, w word) {
		if w.kind() != kindNamed || w.vouched() || err != nil {
			return
		}
		gpa := t.gpa(page)
		if run.Size > 0 && run.End() == gpa {
			run.Size += memory.PageSize
			return
		}
		if run.Size > 0 {
			err = f(run)
		}
		run = memory.Range{Start: gpa, Size: memory.PageSize}
	})
	if err == nil && run.Size > 0 {
		err = f(run)
	}
	return err
}

// prove proves the provisional names of r, whose pages are armed. A layer that
// cannot be read proves nothing: its names stay provisional, and the error is
// returned.
func (p *proof) prove(r memory.Range) error {
	if p.buf == nil {
		p.buf = make([]byte, proofBuffer)
	}
	p.begin(r)
	var failed error
	for claims := p.claims; len(claims) > 0; {
		n := p.adjacent(claims)
		if err := p.compare(claims[:n]); err != nil {
			failed = err
		}
		claims = claims[n:]
	}
	return failed
}

// begin claims the pages, in the order of their blocks.
func (p *proof) begin(r memory.Range) {
	p.claims = p.claims[:0]
	p.table.eachPage(r, func(page uint32, w word) {
		if w.kind() == kindNamed && !w.vouched() && (p.wanted == nil || p.wanted(w.key().layer())) && p.table.swap(page, w, w|provingBit) {
			p.claims = append(p.claims, claim{page, w | provingBit})
		}
	})
	slices.SortFunc(p.claims, func(a, b claim) int { return cmp.Compare(a.word.key(), b.word.key()) })
}

// adjacent returns how many claims from the first on are about neighbouring
// blocks, or the same, as far as they fit into the buffer.
func (p *proof) adjacent(claims []claim) int {
	n := 1
	for first := claims[0].word.key(); n < len(claims); n++ {
		k, last := claims[n].word.key(), claims[n-1].word.key()
		if k > last+1 || uint64(k-first+1)*BlockSize > uint64(len(p.buf)) {
			break
		}
	}
	return n
}

// compare reads the blocks of adjacent claims and ends the claims.
func (p *proof) compare(claims []claim) error {
	first, last := claims[0].word.key(), claims[len(claims)-1].word.key()
	layer := p.table.layer(first.layer())
	blocks := p.buf[:uint64(last-first+1)*BlockSize]
	p.read += int64(len(blocks))
	n, err := layer.Source.ReadAt(blocks, int64(first.block())*BlockSize)
	switch {
	case n == len(blocks):
		err = nil
	case err == nil:
		err = io.ErrUnexpectedEOF
	}
	for _, c := range claims {
		if err != nil {
			p.table.swap(c.page, c.word, c.word&^provingBit)
			continue
		}
		block := blocks[uint64(c.word.key()-first)*BlockSize:][:BlockSize]
		page, viewErr := p.space.View(p.table.gpa(c.page), memory.PageSize)
		p.table.endProof(c, viewErr == nil && bytes.Equal(page, block))
	}
	return err
}

// endProof proves the page or drops its name, unless something happened to
// either since the claim.
func (t *Table) endProof(c claim, equal bool) {
	if equal {
		if t.swap(c.page, c.word, c.word&^provingBit|provenWord) {
			t.stats.proven.Add(1)
		}
		return
	}
	if t.leaveChain(c.page, c.word, func(w word) (word, bool) { return 0, w == c.word }) {
		t.stats.refuted.Add(1)
	}
}
