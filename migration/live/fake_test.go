package live

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ditto.vm/images/layer"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/migration/state"
)

// world is what both sides see: disks and their lock, and who runs.
type world struct {
	t       testing.TB
	layers  [][]byte
	mu      sync.Mutex             // who dies, runs and has disks
	disks   atomic.Pointer[string] // who has the lock
	runners atomic.Int32
	blocks  sync.RWMutex // what is in layers
	disk    *fakeDisk    // that is copied; nil for none
}

func (w *world) lock(who string) error {
	if !w.disks.CompareAndSwap(nil, &who) {
		return fmt.Errorf("%s wants the disks, %s has them", who, *w.disks.Load())
	}
	return nil
}

func (w *world) unlock(who string) {
	if now := w.disks.Load(); now != nil && *now == who {
		w.disks.Store(nil)
	}
}

// run notes that somebody lets the guest run: nobody else may.
func (w *world) run(who string) {
	if n := w.runners.Add(1); n != 1 {
		w.t.Errorf("%s lets the guest run, and so do %d others", who, n-1)
	}
	if now := w.disks.Load(); now == nil || *now != who {
		w.t.Errorf("%s lets the guest run without its disks", who)
	}
}

func (w *world) stop() { w.runners.Add(-1) }

// newWorld makes layers of random blocks.
func newWorld(t testing.TB, layerPages ...int) *world {
	w := &world{t: t}
	random := rand.NewChaCha8([32]byte{1})
	for _, n := range layerPages {
		b := make([]byte, n<<memory.PageShift)
		_, _ = random.Read(b)
		w.layers = append(w.layers, b)
	}
	return w
}

// block returns some block of some layer.
func (w *world) block(random *rand.Rand) []byte {
	l := w.layers[random.IntN(len(w.layers))]
	return l[random.IntN(len(l)>>memory.PageShift)<<memory.PageShift:][:memory.PageSize]
}

// fakeVM is a VM at the source: memory, a tracker that is exact, and a guest that
// writes.
type fakeVM struct {
	w     *world
	mem   *memory.Space
	hints []names.Name // by page, over all regions

	mu    sync.Mutex // a write and its note are one, for the tracker
	dirty *memory.PageSet

	guest   func(ctx context.Context, vm *fakeVM) // writes until the end
	stopped func()                                // ends the guest, nil while it stands still
	dead    bool

	sections  []state.Section
	began     bool
	throttle  atomic.Int32
	throttled atomic.Int32 // the most
	left      string
	names     func() error
	ended     chan struct{} // closed by who ends it after the commit
	untracked bool
	// collect is what Collect does, if not what it should: to break it.
	collect func(into *memory.PageSet)
}

func newSpace(t testing.TB, size uint64) *memory.Space {
	mem, err := memory.New(memory.Config{Size: size, HugePages: memory.HugePagesOff})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = mem.Close() })
	return mem
}

// newFakeVM makes a VM that runs, with a guest that does nothing.
func newFakeVM(w *world, size uint64) *fakeVM {
	vm := &fakeVM{
		w: w, mem: newSpace(w.t, size), hints: make([]names.Name, size>>memory.PageShift),
		sections: []state.Section{{Name: "machine", Version: 1, Bytes: []byte("state")}, {Name: "cpu", Version: 1}},
		guest:    func(ctx context.Context, _ *fakeVM) { <-ctx.Done() },
	}
	vm.dirty = vm.mem.NewPageSet()
	return vm
}

// startFirst lets the guest run for the first time.
func (vm *fakeVM) startFirst() {
	if err := vm.w.lock("source"); err != nil {
		vm.w.t.Fatal(err)
	}
	_ = vm.Resume(context.Background())
	vm.w.t.Cleanup(func() {
		_ = vm.Pause(context.Background())
	})
}

// index returns the place of a page in hints.
func (vm *fakeVM) index(gfn memory.GFN) int {
	at := 0
	for _, r := range vm.mem.Regions() {
		if r.Contains(gfn.GPA(), 1) {
			return at + int(gfn-r.Start.GFN())
		}
		at += int(r.Size >> memory.PageShift)
	}
	panic("no such page")
}

// gfn is the reverse.
func (vm *fakeVM) gfn(index int) memory.GFN {
	for _, r := range vm.mem.Regions() {
		if n := int(r.Size >> memory.PageShift); index < n {
			return r.Start.GFN() + memory.GFN(index)
		} else {
			index -= n
		}
	}
	panic("no such page")
}

// write writes as the guest does.
func (vm *fakeVM) write(gpa memory.GPA, b []byte) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if err := vm.mem.WriteAt(b, gpa); err != nil {
		panic(err)
	}
	vm.dirty.Add(gpa, uint64(len(b)))
}

func (vm *fakeVM) Offer(context.Context) (Offer, error) {
	o := Offer{Name: "vm", Ditto: "test", Config: json.RawMessage(`{}`), Untracked: vm.untracked}
	for _, r := range vm.mem.Regions() {
		o.RAM = append(o.RAM, r.Range)
	}
	for i, b := range vm.w.layers {
		o.Layers = append(o.Layers, Layer{ID: layer.NewWritten(), Path: fmt.Sprint(i), Size: int64(len(b)), Disk: 0, Depth: i})
	}
	return o, nil
}

func (vm *fakeVM) Memory() *memory.Space { return vm.mem }

func (vm *fakeVM) Begin(context.Context) error {
	if vm.began {
		return errors.New("it is saved or migrated already")
	}
	vm.began = true
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.dirty.Clear()
	return nil
}

func (vm *fakeVM) End() error {
	if !vm.began {
		return errors.New("not begun")
	}
	vm.began = false
	return nil
}

// Load implements Recorded.
func (vm *fakeVM) Load(dst []names.Name, gfn memory.GFN) { copy(dst, vm.hints[vm.index(gfn):]) }

func (vm *fakeVM) Names(_ context.Context, progress func(done, total uint64)) (Recorded, error) {
	progress(1, 2)
	if vm.names != nil {
		return vm, vm.names()
	}
	return vm, nil
}

func (vm *fakeVM) Collect(into *memory.PageSet) error {
	if vm.collect != nil {
		vm.collect(into)
		return nil
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	for r := range vm.dirty.Runs() {
		into.Add(r.Start, r.Size)
	}
	vm.dirty.Clear()
	return nil
}

func (vm *fakeVM) Throttle(percent int) {
	vm.throttle.Store(int32(percent))
	vm.throttled.Store(max(vm.throttled.Load(), int32(percent)))
}

// errDead is of a process that was killed.
var errDead = errors.New("killed")

// kill ends the process of the source.
func (vm *fakeVM) kill() {
	_ = vm.Pause(context.Background())
	vm.w.mu.Lock()
	defer vm.w.mu.Unlock()
	vm.dead = true
	vm.w.unlock("source")
}

// runs tells whether the guest runs at the source.
func (vm *fakeVM) runs() bool {
	vm.w.mu.Lock()
	defer vm.w.mu.Unlock()
	return vm.stopped != nil
}

func (vm *fakeVM) Pause(context.Context) error {
	vm.w.mu.Lock()
	defer vm.w.mu.Unlock()
	if vm.stopped != nil {
		vm.stopped()
		vm.stopped = nil
		vm.w.stop()
	}
	return nil
}

func (vm *fakeVM) Resume(context.Context) error {
	vm.w.mu.Lock()
	defer vm.w.mu.Unlock()
	if vm.dead {
		return errDead
	}
	if vm.stopped != nil {
		return nil
	}
	vm.w.run("source")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		vm.guest(ctx, vm)
	}()
	vm.stopped = func() { cancel(); <-done }
	return nil
}

func (vm *fakeVM) State(context.Context) ([]state.Section, error) {
	if vm.runs() {
		return nil, errors.New("state of a VM that runs")
	}
	// It may change memory, as long as that is collected.
	vm.write(vm.mem.Regions()[0].Start+0x2000, []byte("steal time"))
	return vm.sections, nil
}

func (vm *fakeVM) ReleaseDisks(context.Context) error {
	vm.w.unlock("source")
	return nil
}

func (vm *fakeVM) ReclaimDisks(context.Context) error {
	vm.w.mu.Lock()
	defer vm.w.mu.Unlock()
	if vm.dead {
		return errDead
	}
	if now := vm.w.disks.Load(); now != nil && *now == "source" {
		return nil
	}
	return vm.w.lock("source")
}

func (vm *fakeVM) Committed() <-chan struct{} { return vm.ended }

func (vm *fakeVM) Left(where string) { vm.left = "left to " + where }

// fakeHost is a destination.
type fakeHost struct {
	w *world
	// refuse, construct and run break it.
	refuse, construct, run error
	size                   uint64 // of the memory it makes, if another than offered
	missing                map[int]bool
	huge                   memory.HugePages
	layers                 [][]byte // its own, if others than the world's

	mem       *memory.Space
	sections  []state.Section
	running   bool
	dead      bool
	abandoned int
	reads     atomic.Int64
	slow      bool // its disks are
	later     *memory.PageSet
	source    memory.PageSource
	placing   sync.Mutex
	fetched   chan error // what became of the pages that came later
	// same is called when the guest is about to run.
	same func()
}

func (h *fakeHost) Prepare(_ context.Context, o Offer) (Arrival, error) {
	if h.refuse != nil {
		return nil, h.refuse
	}
	size := h.size
	if size == 0 {
		for _, r := range o.RAM {
			size += r.Size
		}
	}
	var err error
	h.mem, err = memory.New(memory.Config{Size: size, HugePages: h.huge})
	if err != nil {
		return nil, err
	}
	h.w.t.Cleanup(func() { _ = h.mem.Close() })
	return h, nil
}

func (h *fakeHost) Memory() *memory.Space { return h.mem }

// layerReader reads a layer and counts.
type layerReader struct {
	b []byte
	h *fakeHost
}

func (l layerReader) ReadAt(p []byte, off int64) (int, error) {
	if n := l.h.reads.Add(1); l.h.slow && n%3 == 0 {
		time.Sleep(2 * time.Millisecond)
	}
	l.h.w.blocks.RLock()
	defer l.h.w.blocks.RUnlock()
	if off >= int64(len(l.b)) {
		return 0, io.EOF
	}
	n := copy(p, l.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (h *fakeHost) Layer(n int) io.ReaderAt {
	layers := h.layers
	if layers == nil {
		layers = h.w.layers
	}
	if h.missing[n] || n >= len(layers) {
		return nil
	}
	return layerReader{layers[n], h}
}

func (h *fakeHost) Construct(_ context.Context, sections []state.Section, later *memory.PageSet, source memory.PageSource) error {
	if h.construct != nil {
		return h.construct
	}
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	if h.dead {
		return errDead
	}
	h.sections, h.later, h.source = sections, later, source
	return h.w.lock("destination")
}

// kill ends the process of the destination.
func (h *fakeHost) kill() {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	h.dead = true
	h.w.unlock("destination")
	if h.running {
		h.running = false
		h.w.stop()
	}
}

func (h *fakeHost) isDead() bool {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	return h.dead
}

// runs tells whether the guest runs at the destination.
func (h *fakeHost) runs() bool {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	return h.running
}

func (h *fakeHost) Run(context.Context) error {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	switch {
	case h.dead:
		return errDead
	case h.run != nil:
		return h.run
	}
	if h.same != nil && h.source == nil {
		h.same()
	}
	h.w.run("destination")
	h.running = true
	if h.source != nil {
		h.fetched = make(chan error, 1)
		go func() { h.fetched <- h.fetch() }()
	}
	return nil
}

// fetch does what the guest and memory.Missing do: some pages are touched here and
// there, and in the background all are fetched in their order.
func (h *fakeHost) fetch() error {
	place := func(r memory.Range) error {
		b := make([]byte, r.Size)
		if err := h.source.ReadPages(r.Start.GFN(), b); err != nil {
			return err
		}
		h.placing.Lock()
		defer h.placing.Unlock()
		for i := uint64(0); i < r.Size; i += memory.PageSize {
			if gpa := r.Start + memory.GPA(i); h.later.Has(gpa) {
				h.later.Remove(gpa, memory.PageSize)
				if err := h.mem.WriteAt(b[i:i+memory.PageSize], gpa); err != nil {
					return err
				}
			}
		}
		return nil
	}
	var rows []memory.Range
	for r := range h.later.Runs() {
		for ; r.Size > 0; r.Start, r.Size = r.Start+memory.PageSize, r.Size-memory.PageSize {
			if row := h.source.Row(r.Start.GFN()); len(rows) == 0 || rows[len(rows)-1] != row {
				rows = append(rows, row)
			}
		}
	}
	errs := make(chan error, 3)
	for vcpu := range 2 {
		go func() {
			random, err := rand.New(rand.NewPCG(uint64(vcpu), 5)), error(nil)
			for i := 0; i < 8 && err == nil && len(rows) > 0; i++ {
				row := rows[random.IntN(len(rows))]
				err = place(memory.Range{Start: row.Start + memory.GPA(random.Uint64N(row.Size)&^(memory.PageSize-1)), Size: memory.PageSize})
			}
			errs <- err
		}()
	}
	go func() {
		var err error
		for i := 0; i < len(rows) && err == nil; i++ {
			err = place(rows[i])
		}
		errs <- err
	}()
	if err := errors.Join(<-errs, <-errs, <-errs); err != nil {
		return err
	}
	h.source.(Arrivals).Arrived()
	return nil
}

func (h *fakeHost) Abandon() error {
	h.abandoned++
	h.w.unlock("destination")
	return nil
}

// differing returns the pages in which two memories differ.
func differing(t testing.TB, a, b *memory.Space) (pages []memory.GFN) {
	t.Helper()
	for _, r := range a.Regions() {
		x, err := a.View(r.Start, r.Size)
		if err != nil {
			t.Fatal(err)
		}
		y, err := b.View(r.Start, r.Size)
		if err != nil {
			t.Fatal(err)
		}
		for at := 0; at < len(x); at += memory.PageSize {
			if string(x[at:at+memory.PageSize]) != string(y[at:at+memory.PageSize]) {
				pages = append(pages, (r.Start + memory.GPA(at)).GFN())
			}
		}
	}
	return pages
}

// fill gives memory every kind of page, with hints of which some are wrong.
func (vm *fakeVM) fill(seed uint64) {
	random := rand.New(rand.NewPCG(seed, 0))
	page := make([]byte, memory.PageSize)
	n := len(vm.hints)
	for i := 0; i < n; i++ {
		gfn := vm.gfn(i)
		switch random.IntN(8) {
		case 0, 1: // a hole
			continue
		case 2: // zeros that are there
			clear(page)
			vm.hints[i] = names.ZeroPage
		case 3, 4: // runs of blocks
			l := random.IntN(len(vm.w.layers))
			blocks := len(vm.w.layers[l]) >> memory.PageShift
			block := random.IntN(blocks)
			for k := 0; k < 40 && i < n && block < blocks; k, i, block = k+1, i+1, block+1 {
				b := vm.w.layers[l][block<<memory.PageShift:][:memory.PageSize]
				if err := vm.mem.WriteAt(b, vm.gfn(i).GPA()); err != nil {
					panic(err)
				}
				vm.hints[i] = names.OfBlock(names.LayerID(l), uint64(block))
				if random.IntN(50) == 0 { // a lie
					vm.hints[i] = names.OfBlock(names.LayerID(l), uint64(random.IntN(blocks+5)))
				}
			}
			i--
			continue
		case 5: // a page that is elsewhere
			if i == 0 {
				continue
			}
			of := vm.gfn(random.IntN(i))
			if err := vm.mem.ReadAt(page, of.GPA()); err != nil {
				panic(err)
			}
			vm.hints[i] = names.OfPage(uint64(of))
			if random.IntN(20) == 0 {
				vm.hints[i] = names.OfPage(uint64(vm.gfn(random.IntN(n))))
			}
		case 6: // text
			copy(page, fmt.Sprintf("%04000d", random.Uint64()))
		default:
			for j := range page {
				page[j] = byte(random.Uint32())
			}
		}
		if err := vm.mem.WriteAt(page, gfn.GPA()); err != nil {
			panic(err)
		}
	}
}

// writer is a guest that writes all the time, with less zeal when throttled.
func writer(seed uint64, pause time.Duration) func(context.Context, *fakeVM) {
	return func(ctx context.Context, vm *fakeVM) {
		random := rand.New(rand.NewPCG(seed, 1))
		for ctx.Err() == nil {
			gpa := vm.gfn(random.IntN(len(vm.hints))).GPA()
			switch random.IntN(6) {
			case 0:
				vm.write(gpa, make([]byte, memory.PageSize))
			case 1: // what it just read from disk
				vm.w.blocks.RLock()
				vm.write(gpa, vm.w.block(random))
				vm.w.blocks.RUnlock()
			case 2: // it writes to disk
				vm.w.blocks.Lock()
				vm.w.block(random)[random.IntN(memory.PageSize)]++
				vm.w.blocks.Unlock()
			default:
				vm.write(gpa+memory.GPA(random.IntN(4000)), []byte{byte(random.Uint32()), byte(random.Uint32())})
			}
			time.Sleep(pause * 100 / time.Duration(101-min(100, vm.throttle.Load())))
		}
	}
}
