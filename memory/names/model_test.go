package names

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"ditto.vm/memory"
)

// The model is a guest with few pages and a disk with few blocks, so that
// everything meets everything. One goroutine draws what happens next: requests
// begin, move some bytes and end, several in flight at once; vCPUs store; the VMM
// writes and reports later; the prover steps, and while it waits for the tracker
// or the disk more of it happens. At pauses names are compared with bytes.
//
// What must hold at a pause: a page with a proven name equals its block. And a
// page with a provisional name equals its block, unless a vCPU stored into it
// since the I/O that named it began, which only the tracker can know.

const (
	modelFrames = 2
	modelPages  = 8 // of each frame that are used
	modelBlocks = 12
	quiet       = 100 // a depth at which nothing else happens
)

type model struct {
	t      testing.TB
	rng    *rand.Rand
	space  *memory.Space
	table  *Table
	watch  *Watched
	prover *Prover
	layer  LayerID
	disk   []byte

	armed    [modelFrames * 512]bool
	large    [modelFrames]bool
	inFlight []*modelIO
	late     []memory.Range // written by the VMM, not yet reported
	stored   map[memory.GFN]bool
	depth    int
	locked   bool // the tracker is at work
	proving  bool
	resizing bool

	proven, provisional int // names that were compared
}

// modelIO is a request in flight.
type modelIO struct {
	kind   string
	offset int64
	n      int64
	mem    []memory.Range
	moved  int64 // bytes transferred
	fail   bool
}

func newModel(t testing.TB, seed uint64) *model {
	space, err := memory.New(memory.Config{Size: modelFrames * memory.LargeFrameSize})
	if err != nil {
		t.Fatal(err)
	}
	m := &model{
		t: t, rng: rand.New(rand.NewPCG(seed, 1)), space: space, table: NewTable(space),
		disk: make([]byte, modelBlocks*BlockSize), stored: map[memory.GFN]bool{},
	}
	m.watch = Watch(space, modelTracker{m}, m.table)
	space.SetObserver(m.watch)
	for i := range m.large {
		m.large[i] = true
	}
	m.scribble(m.disk)
	m.layer, err = m.table.AddLayer(Layer{Title: "model", Size: int64(len(m.disk)), Source: modelSource{m}})
	if err != nil {
		t.Fatal(err)
	}
	policy := DefaultProverPolicy()
	policy.Quiet, policy.WithLog = 0, true
	m.prover = NewProver(space, m.table, m.watch, modelFramesBook{m}, policy, slog.New(slog.DiscardHandler))
	return m
}

// yield lets other things happen.
func (m *model) yield() {
	if m.depth >= 3 {
		return
	}
	m.depth++
	if m.rng.IntN(3) == 0 {
		for range 1 + m.rng.IntN(3) {
			m.event()
		}
	}
	m.depth--
}

// event is one thing that happens.
func (m *model) event() {
	switch n := m.rng.IntN(100); {
	case n < 18:
		m.begin("read")
	case n < 32:
		m.begin("write")
	case n < 36:
		m.begin("erase")
	case n < 48 && len(m.inFlight) > 0:
		m.progress(m.inFlight[m.rng.IntN(len(m.inFlight))], m.rng.Int64N(8192))
	case n < 70:
		m.end()
	case n < 76:
		m.store()
	case n < 79:
		m.hostWrite()
	case n < 82:
		m.report()
	case n < 83:
		m.discard()
	case n < 84:
		m.resize()
	case n < 87:
		m.record()
	case n < 90 && !m.locked:
		m.consume()
	case !m.proving && !m.locked:
		m.proving = true
		depth := m.depth
		if m.rng.IntN(2) == 0 {
			m.depth = quiet
		}
		// The first step sees that something happened, the second that nothing
		// did since, unless it does meanwhile.
		for range 3 {
			_, err := m.prover.Step(context.Background())
			m.check(err)
		}
		m.depth, m.proving = depth, false
	}
}

func (m *model) check(err error) {
	if err != nil {
		m.t.Fatal(err)
	}
}

// page draws a page that is used.
func (m *model) page() memory.GPA {
	return memory.GPA(m.rng.IntN(modelFrames))*memory.LargeFrameSize + memory.GPA(m.rng.IntN(modelPages))*memory.PageSize
}

func (m *model) view(gpa memory.GPA, n uint64) []byte {
	b, err := m.space.View(gpa, n)
	m.check(err)
	return b
}

// scribble changes every sector.
func (m *model) scribble(b []byte) {
	for ; len(b) >= 8; b = b[min(512, len(b)):] {
		binary.LittleEndian.PutUint64(b, m.rng.Uint64())
	}
}

// store is a vCPU's.
func (m *model) store() {
	gpa := m.page()
	frame := gpa / memory.LargeFrameSize
	if m.armed[gpa.GFN()] && m.large[frame] {
		m.large[frame] = false
	}
	m.armed[gpa.GFN()] = false
	m.stored[gpa.GFN()] = true
	m.scribble(m.view(gpa+memory.GPA(512*m.rng.IntN(8)), 8))
}

// hostWrite is a device's that is no disk: it is reported later.
func (m *model) hostWrite() {
	r := memory.Range{Start: m.page() + memory.GPA(m.rng.IntN(4096)), Size: uint64(1 + m.rng.IntN(2000))}
	for g := r.Start.GFN(); g <= (r.End() - 1).GFN(); g++ {
		m.scribble(m.view(max(r.Start, g.GPA()), 8))
	}
	m.late = append(m.late, r)
}

func (m *model) report() {
	if n := len(m.late); n > 0 {
		r := m.late[n-1]
		m.late = m.late[:n-1]
		m.space.Wrote(r.Start, r.Size)
	}
}

func (m *model) discard() {
	gpa := m.page()
	m.large[gpa/memory.LargeFrameSize] = false
	clear(m.view(gpa, memory.PageSize))
	m.space.Wrote(gpa, memory.PageSize)
}

func (m *model) resize() {
	if len(m.inFlight) > 0 || m.depth > 1 {
		return
	}
	m.resizing = true // nothing begins
	size := int64(modelBlocks-m.rng.IntN(5)) * BlockSize
	if old := int64(len(m.disk)); size <= old {
		m.table.DropBeyond(m.layer, size)
		m.disk = m.disk[:size]
	} else {
		m.disk = append(m.disk[:old:old], make([]byte, size-old)...)
		m.table.DropBeyond(m.layer, size)
	}
	m.resizing = false
}

// record is a loader's: it fills a page with what the block holds, or names one
// that I/O may have, or a block that is not there.
func (m *model) record() {
	gpa, block := m.page(), m.rng.Uint64N(modelBlocks+1)
	name := OfBlock(m.layer, block)
	if off := block * BlockSize; off < uint64(len(m.disk)) {
		copy(m.view(gpa, BlockSize), m.disk[off:])
		m.space.Wrote(gpa, BlockSize)
		delete(m.stored, gpa.GFN())
	}
	m.table.Record(gpa, name)
}

// consume is somebody else who tracks: a migration.
func (m *model) consume() {
	frame := memory.Range{Start: memory.GPA(m.rng.IntN(modelFrames)) * memory.LargeFrameSize, Size: memory.LargeFrameSize}
	if m.rng.IntN(2) == 0 {
		for range 4 {
			m.store()
		}
	}
	switch m.rng.IntN(4) {
	case 0:
		m.large[frame.Start/memory.LargeFrameSize] = false
		m.check(m.watch.Arm(frame))
	case 1:
		m.check(m.watch.Disarm(frame))
	default:
		set := m.space.NewPageSet()
		m.check(m.watch.Collect(frame, set, memory.Rearm))
	}
}

// errWrongName is what the model is there to find.
var errWrongName = errors.New("wrong name")

// pause drains the devices and compares every name with its block.
func (m *model) pause() error {
	m.depth = quiet
	for len(m.inFlight) > 0 {
		m.end()
	}
	for len(m.late) > 0 {
		m.report()
	}
	m.check(m.prover.Settle(context.Background()))
	m.depth = 0
	for page := range uint32(m.table.pages) {
		gpa := m.table.gpa(page)
		name := m.table.At(gpa.GFN())
		if name.Kind() == None {
			if w := m.table.load(page); w != 0 && mutant == "" {
				return fmt.Errorf("page %s is in flight without I/O: %#x", gpa, uint64(w))
			}
			continue
		}
		if !name.Proven() && m.stored[gpa.GFN()] {
			continue
		}
		off := int(name.Number()) * BlockSize
		if off+BlockSize > len(m.disk) || !bytes.Equal(m.disk[off:off+BlockSize], m.view(gpa, BlockSize)) {
			return fmt.Errorf("%w: page %s is not %s (proven %t)", errWrongName, gpa, name, name.Proven())
		}
		if name.Proven() {
			m.proven++
		} else {
			m.provisional++
		}
	}
	if mutant != "" {
		return nil // only wrong names count
	}
	return m.table.invariants()
}

// invariants compares chains and counts with the words. Nothing is in flight.
func (t *Table) invariants() error {
	used, vouched := make([]int, len(t.frames)), make([]int, len(t.frames))
	chained := 0
	for page := range uint32(t.pages) {
		w := t.load(page)
		if w != 0 {
			used[page>>frameShift]++
		}
		if w.vouched() {
			vouched[page>>frameShift]++
		}
		if !w.chained() {
			continue
		}
		chained++
		head, _ := t.inverse.bucket(w.key())
		found := false
		for p := *head; p != 0 && !found; p = t.inverse.next[p-1] {
			found = p == page+1
		}
		if !found {
			return fmt.Errorf("page %d is not in the chain of its block", page)
		}
	}
	for _, p := range t.inverse.heads {
		for ; p != 0; p = t.inverse.next[p-1] {
			chained--
		}
	}
	for i := range used {
		if c := t.count(i); c.used() != used[i] || c.vouched() != vouched[i] {
			return fmt.Errorf("frame %d counts %d and %d pages of %d and %d", i, c.used(), c.vouched(), used[i], vouched[i])
		}
	}
	if chained != 0 {
		return fmt.Errorf("the chains hold %d pages too many", -chained)
	}
	for i := range t.changes.buckets {
		if n := len(t.changes.buckets[i].spans); n > 0 {
			return fmt.Errorf("%d changes have not ended", n)
		}
	}
	return nil
}

// runModel runs a model for so many pauses and returns the first wrong name.
func runModel(t testing.TB, seed uint64, pauses int) (m *model, err error) {
	m = newModel(t, seed)
	defer m.space.Close()
	modelYield = m.yield
	defer func() { modelYield = nil }()
	for range pauses {
		for range 200 {
			m.event()
		}
		if err := m.pause(); err != nil {
			return m, fmt.Errorf("seed %d: %w", seed, err)
		}
	}
	return m, nil
}

// modelYield is called by mutated code at the places where other goroutines
// matter; see mutant_test.go.
var modelYield func()

func TestModel(t *testing.T) {
	seeds := 40
	if s := os.Getenv("DITTO_MODEL_SEEDS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		seeds = n
	}
	proven, provisional := 0, 0
	for seed := range uint64(seeds) {
		m, err := runModel(t, seed, 20)
		if err != nil {
			t.Fatal(err)
		}
		proven, provisional = proven+m.proven, provisional+m.provisional
	}
	t.Logf("compared %d proven and %d provisional names", proven, provisional)
	if proven < 5*seeds || provisional < 10*seeds {
		t.Errorf("compared %d proven and %d provisional names: too few to show anything", proven, provisional)
	}
}
