package names

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
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

// modelTracker sees the stores of vCPUs by itself, and of the VMM what it is
// told: like KVM's log, and like wp-async with pinned pages.
type modelTracker struct{ m *model }

func (k modelTracker) Kind() memory.TrackerKind { return memory.TrackerWPAsync }
func (k modelTracker) Close() error             { return nil }

func (k modelTracker) each(r memory.Range, f func(memory.GFN)) {
	for gpa := r.Start; gpa < r.End(); gpa += memory.PageSize {
		f(gpa.GFN())
	}
}

func (k modelTracker) HostWrite(gpa memory.GPA, n uint64) {
	k.each(memory.Range{Start: gpa &^ 4095, Size: (n + uint64(gpa)%4096 + 4095) &^ 4095}, func(g memory.GFN) { k.m.armed[g] = false })
}

func (k modelTracker) Arm(r memory.Range) error {
	if r.Size < memory.LargeFrameSize && k.m.large[r.Start/memory.LargeFrameSize] {
		return memory.ErrPartOfLargeFrame
	}
	k.m.whileLocked(func() { k.each(r, func(g memory.GFN) { k.m.armed[g] = true }) })
	return nil
}

func (k modelTracker) Disarm(r memory.Range) error {
	k.m.whileLocked(func() { k.each(r, func(g memory.GFN) { k.m.armed[g] = false }) })
	return nil
}

func (k modelTracker) Remapped(r memory.Range) error { return k.Disarm(r) }

func (k modelTracker) Collect(r memory.Range, into *memory.PageSet, mode memory.CollectMode) error {
	k.m.whileLocked(func() {
		k.each(r, func(g memory.GFN) {
			if k.m.armed[g] {
				return
			}
			into.Add(g.GPA(), 1)
			if mode == memory.Rearm {
				k.m.armed[g] = true
			}
		})
	})
	return nil
}

// whileLocked runs f in one moment, with other things before and after, but no
// other use of the tracker.
func (m *model) whileLocked(f func()) {
	was := m.locked
	m.locked = true
	m.yield()
	f()
	m.yield()
	m.locked = was
}

// modelFramesBook is the host's view of frames: a store into an armed large one
// breaks it.
type modelFramesBook struct{ m *model }

func (f modelFramesBook) Refresh(memory.Range) error { return nil }

func (f modelFramesBook) At(gpa memory.GPA) (memory.FrameState, memory.FrameReasons, bool) {
	if f.m.large[gpa/memory.LargeFrameSize] {
		return memory.FrameLarge, 0, true
	}
	return memory.FrameSmall, memory.ReasonTracking, true
}

func (f modelFramesBook) Collapse(gpa memory.GPA, _ int) error {
	m := f.m
	m.yield()
	switch m.rng.IntN(6) {
	case 0:
		return &memory.FrameError{Op: "collapse", GPA: gpa, Err: memory.ErrFrameBusy}
	case 1:
		return &memory.FrameError{Op: "collapse", GPA: gpa, Err: memory.ErrFrameHeld}
	}
	modelTracker{m}.each(memory.Range{Start: gpa, Size: memory.LargeFrameSize}, func(g memory.GFN) { m.armed[g] = false })
	if m.rng.IntN(6) == 0 {
		return &memory.FrameError{Op: "collapse", GPA: gpa, Err: memory.ErrNoHugePage}
	}
	m.large[gpa/memory.LargeFrameSize] = true
	m.yield()
	return nil
}

// modelSource reads the disk as the prover does.
type modelSource struct{ m *model }

func (s modelSource) ReadAt(p []byte, off int64) (int, error) {
	s.m.yield()
	n := 0
	if off < int64(len(s.m.disk)) {
		n = copy(p, s.m.disk[off:])
	}
	s.m.yield()
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
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

func (m *model) begin(kind string) {
	if len(m.inFlight) > 5 || m.resizing {
		return
	}
	r := &modelIO{kind: kind, fail: m.rng.IntN(12) == 0}
	r.offset = m.rng.Int64N(int64(len(m.disk))/BlockSize) * BlockSize
	odd := m.rng.IntN(8) == 0
	if odd {
		r.offset += 512 * m.rng.Int64N(8)
	}
	room := int64(len(m.disk)) - r.offset
	for range 1 + m.rng.IntN(3) {
		mem := memory.Range{Start: m.page(), Size: memory.PageSize}
		switch {
		case m.rng.IntN(6) == 0:
			mem.Size *= 2
		case odd && m.rng.IntN(2) == 0, m.rng.IntN(20) == 0:
			mem.Size = 512 * uint64(1+m.rng.IntN(7))
			mem.Start += memory.GPA(512 * m.rng.IntN(8))
		}
		if r.n+int64(mem.Size) > room {
			break
		}
		r.mem, r.n = append(r.mem, mem), r.n+int64(mem.Size)
	}
	if r.n == 0 {
		return
	}
	m.clean(r)
	switch kind {
	case "read":
		m.table.BeginRead(m.layer, r.offset, r.mem)
	case "write":
		m.table.BeginWrite(m.layer, r.offset, r.mem)
	case "erase":
		m.table.BeginErase(m.layer, r.offset, r.n)
	}
	m.inFlight = append(m.inFlight, r)
}

// clean forgets the stores into pages that a request may name: what they made of
// the page is what the request brings to the disk, or is overwritten by it.
func (m *model) clean(r *modelIO) {
	if r.kind == "erase" {
		return
	}
	offset := r.offset
	for _, mem := range r.mem {
		aligned := (uint64(mem.Start)^uint64(offset))%4096 == 0
		for gpa := (mem.Start + 4095) &^ 4095; aligned && gpa+4096 <= mem.End(); gpa += 4096 {
			delete(m.stored, gpa.GFN())
		}
		offset += int64(mem.Size)
	}
}

// progress moves up to n bytes more. Half of the requests move backwards.
func (m *model) progress(r *modelIO, n int64) {
	n = min(n, r.n-r.moved)
	from, to := r.moved, r.moved+n
	if r.offset/512%2 == int64(len(r.mem))%2 {
		from, to = r.n-r.moved-n, r.n-r.moved
	}
	r.moved += n
	if r.kind == "erase" {
		clear(m.disk[r.offset+from : r.offset+to])
		return
	}
	at := int64(0)
	for _, mem := range r.mem {
		lo, hi := max(from, at), min(to, at+int64(mem.Size))
		if lo < hi {
			page, block := m.view(mem.Start+memory.GPA(lo-at), uint64(hi-lo)), m.disk[r.offset+lo:r.offset+hi]
			if r.kind == "read" {
				copy(page, block)
			} else {
				copy(block, page)
			}
		}
		at += int64(mem.Size)
	}
}

func (m *model) end() {
	if len(m.inFlight) == 0 {
		return
	}
	i := m.rng.IntN(len(m.inFlight))
	r := m.inFlight[i]
	m.inFlight = append(m.inFlight[:i], m.inFlight[i+1:]...)
	if !r.fail {
		m.progress(r, r.n)
	}
	switch r.kind {
	case "read":
		for _, mem := range r.mem {
			m.space.Wrote(mem.Start, mem.Size)
		}
		m.table.EndRead(m.layer, r.offset, r.mem, !r.fail)
	case "write":
		m.table.EndWrite(m.layer, r.offset, r.mem, !r.fail)
	case "erase":
		m.table.EndErase(m.layer, r.offset, r.n)
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
			if w := m.table.load(page); w != 0 && activeMutant == "" {
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
	if activeMutant != "" {
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
