package vmm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/vmm/api"
)

// planted writes pages that a look must tell apart, in an otherwise empty frame,
// and returns a running machine with them.
func planted(t *testing.T) *VM {
	t.Helper()
	c := payloadConfig("spin")
	c.Memory.Size = 32 << 20
	m := newVM(t, c, newConsole())
	if err := m.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	page := make([]byte, memory.PageSize)
	rng := rand.New(rand.NewPCG(3, 4))
	put := func(n int) {
		if err := m.mem.WriteAt(page, memory.GPA(16<<20+n*memory.PageSize)); err != nil {
			t.Fatal(err)
		}
	}
	put(0) // zeros
	for n := 1; n < 11; n++ {
		for i := range page {
			page[i] = byte(rng.Uint32())
		}
		put(n)
	}
	for n := 11; n < 14; n++ {
		put(n) // equal to page 10
	}
	return m
}

// sum adds up what a summary counts.
func sum(m api.Memory) uint64 {
	n := m.NotPopulatedBytes + m.ZeroBytes + m.ParentBytes + m.DuplicateBytes + m.UniqueBytes + m.UnknownBytes
	for _, l := range m.Layers {
		n += l.Bytes
	}
	return n
}

func TestMemory(t *testing.T) {
	m := planted(t)
	ctx := deadline(t)
	for _, q := range []api.MemoryQuery{{}, {Pause: true}, {Full: true}, {Full: true, Pause: true}} {
		got, err := m.Memory(ctx, q)
		if err != nil {
			t.Fatal(err)
		}
		if got.Bytes != 32<<20 || sum(got) != got.Bytes || got.Exact != q.Pause || (got.Mode == api.MemoryFull) != q.Full {
			t.Errorf("%+v: %+v counts %d bytes", q, got, sum(got))
		}
		if q.Full && (got.DuplicateBytes < 3*memory.PageSize || got.UniqueBytes < 10*memory.PageSize || got.UnknownBytes != 0 || len(got.Steps) == 0) {
			t.Errorf("%+v: %+v", q, got)
		}
		if f := got.Frames; m.frames != nil && (f.Total != 16 || f.Large+f.Small+f.Empty != f.Total || f.Large+f.Small == 0) {
			t.Errorf("%+v: frames %+v", q, f)
		}
		if got.Tracker.Kind != m.tracker.Kind().String() || got.Names.Enabled != bool(m.cfg.Memory.Names) {
			t.Errorf("%+v: tracker %+v, names %+v", q, got.Tracker, got.Names)
		}
		if s := m.Info().State; s != api.Running {
			t.Errorf("%+v left the machine %s", q, s)
		}
	}
	if err := m.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	got, err := m.Memory(ctx, api.MemoryQuery{Full: true})
	if err != nil || !got.Exact || m.Info().State != api.Paused {
		t.Errorf("a machine that was paused: exact %v, %s, %v", got.Exact, m.Info().State, err)
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := m.Memory(canceled, api.MemoryQuery{Full: true}); !errors.Is(err, context.Canceled) {
		t.Errorf("a canceled look: %v", err)
	}
}

// TestMemoryNames: what is recorded counts for a quick look as it is, for a full
// one only where it is true.
func TestMemoryNames(t *testing.T) {
	m := planted(t)
	disk := make([]byte, 8*memory.PageSize)
	if err := m.mem.ReadAt(disk[4*memory.PageSize:5*memory.PageSize], 16<<20+memory.PageSize); err != nil {
		t.Fatal(err)
	}
	table := m.naming.Table()
	id, err := table.AddLayer(names.Layer{Title: "disk", Size: int64(len(disk)), Immutable: true, Source: bytes.NewReader(disk)})
	if err != nil {
		t.Fatal(err)
	}
	table.Record(16<<20+memory.PageSize, names.OfBlock(id, 4))
	table.Record(16<<20+2*memory.PageSize, names.OfBlock(id, 5)) // which it is not
	for full, want := range map[bool]uint64{false: 2, true: 1} {
		got, err := m.Memory(deadline(t), api.MemoryQuery{Full: full, Pause: true})
		if err != nil {
			t.Fatal(err)
		}
		layer := got.Layers[id]
		if sum(got) != got.Bytes || layer.Bytes != want*memory.PageSize || layer.Title != "disk" || layer.SizeBytes != 8*memory.PageSize || !layer.Immutable || layer.Indexed {
			t.Errorf("full %v: %+v", full, got)
		}
		if !got.Names.Enabled || got.Names.Counters["recorded"] != 2 {
			t.Errorf("names %+v", got.Names)
		}
		pages, err := m.MemoryMap(deadline(t), api.MemoryQuery{Full: full, Pause: true})
		if err != nil {
			t.Fatal(err)
		}
		if c := pages.Classes[pages.Pages[(16<<20)/memory.PageSize+1]]; c.Kind != api.KindLayer || c.Title != "disk" || c.Bytes != want*memory.PageSize {
			t.Errorf("full %v: the page is of class %+v", full, c)
		}
	}
}

// TestArmedBytes: what is armed and left alone counts, what is written after does
// not.
func TestArmedBytes(t *testing.T) {
	m := planted(t)
	if m.tracker.Kind() != memory.TrackerWPAsync {
		t.Skip("wp-async is not to be had here: Linux 6.7 or newer is needed")
	}
	if err := m.Pause(deadline(t)); err != nil {
		t.Fatal(err)
	}
	armed := func() uint64 {
		n, err := m.armedBytes()
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := armed()
	if err := m.tracker.Arm(memory.Range{Start: 16 << 20, Size: memory.LargeFrameSize}); err != nil {
		t.Fatal(err)
	}
	whole := armed() - before
	if whole < 14*memory.PageSize {
		t.Errorf("%d bytes are armed", whole)
	}
	if err := m.mem.WriteAt([]byte{1}, 16<<20); err != nil {
		t.Fatal(err)
	}
	if got := armed() - before; got != whole-memory.PageSize {
		t.Errorf("%d bytes are armed after a write, want %d", got, whole-memory.PageSize)
	}
}

func TestMemoryMap(t *testing.T) {
	m := planted(t)
	got, err := m.MemoryMap(deadline(t), api.MemoryQuery{Full: true, Pause: true})
	if err != nil {
		t.Fatal(err)
	}
	if !got.Exact || got.CellBytes != memory.PageSize || len(got.Pages) != 32<<20/memory.PageSize || len(got.Regions) != 1 || got.Regions[0].Bytes != 32<<20 {
		t.Fatalf("exact %v, cells of %d, %d pages, regions %v", got.Exact, got.CellBytes, len(got.Pages), got.Regions)
	}
	kind := func(gpa memory.GPA) api.MemoryKind { return got.Classes[got.Pages[gpa.GFN()]].Kind }
	for n, want := range map[int]api.MemoryKind{0: api.KindZero, 1: api.KindUnique, 10: api.KindUnique, 11: api.KindDuplicate, 13: api.KindDuplicate} {
		if k := kind(memory.GPA(16<<20 + n*memory.PageSize)); k != want {
			t.Errorf("planted page %d is %s, want %s", n, k, want)
		}
	}
	if k := kind(24 << 20); k != api.KindNotPopulated {
		t.Errorf("an untouched page is %s", k)
	}
	counts := make([]uint64, len(got.Classes))
	for _, c := range got.Pages {
		counts[c]++
	}
	for i, c := range got.Classes {
		if c.Bytes != counts[i]*memory.PageSize {
			t.Errorf("class %+v has %d pages", c, counts[i])
		}
	}
	if m.frames == nil {
		return
	}
	state, why, _ := m.frames.At(16 << 20)
	if len(got.Frames) != 16 || got.Frames[8] != byte(state)<<6|byte(why) || got.Frames[12] != 0 {
		t.Errorf("frames %#x", got.Frames)
	}
}

// TestLookIsUndisturbed: a look ends with the machine, does not undo a pause of
// the user's, and is not exact when somebody lets the machine run meanwhile.
func TestLookIsUndisturbed(t *testing.T) {
	m := planted(t)
	ctx := deadline(t)
	nothing := func(context.Context, bool) error { return nil }
	exact, err := m.look(ctx, true, func(ctx context.Context, _ bool) error { return m.Pause(ctx) })
	if err != nil || !exact || m.Info().State != api.Paused {
		t.Errorf("paused by the user meanwhile: exact %v, %s, %v", exact, m.Info().State, err)
	}
	exact, err = m.look(ctx, true, func(ctx context.Context, still bool) error {
		if !still {
			t.Error("a paused machine runs")
		}
		return errors.Join(m.Resume(ctx), m.Pause(ctx))
	})
	if err != nil || exact {
		t.Errorf("resumed by the user meanwhile: exact %v, %v", exact, err)
	}
	if err := m.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	if _, err := m.look(ctx, true, func(context.Context, bool) error { return broken }); !errors.Is(err, broken) || m.Info().State != api.Running {
		t.Errorf("after a failure: %v, %s", err, m.Info().State)
	}

	begun, ended := make(chan struct{}), make(chan error)
	go func() {
		_, err := m.look(ctx, true, func(ctx context.Context, _ bool) error {
			close(begun)
			<-ctx.Done()
			return ctx.Err()
		})
		ended <- err
	}()
	<-begun
	closed := make(chan error)
	go func() { closed <- m.Close() }()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the machine was closed under a look: %v", err)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if _, err := m.look(ctx, false, nothing); !errors.Is(err, api.ErrWrongState) {
		t.Errorf("a look at a closed machine: %v", err)
	}
}

// TestMapBounds: cells grow with memory, so that the answer does not.
func TestMapBounds(t *testing.T) {
	for size, want := range map[uint64]uint64{
		1 << 20: 4096, 4 << 30: 4096, 4<<30 + 4096: 2 << 20, 64 << 30: 2 << 20, 128 << 30: 2 << 20, 128<<30 + 4096: 4 << 20, 1 << 40: 16 << 20,
	} {
		regions, err := memory.Layout(size)
		if err != nil {
			t.Fatal(err)
		}
		got := cellBytes(regions)
		cells := uint64(0)
		for _, r := range regions {
			cells += (r.Size + got - 1) / got
		}
		if got != want || got > memory.PageSize && cells > api.MaxMapCells || got/memory.PageSize > 1<<16-1 {
			t.Errorf("%d bytes: %d cells of %d, want of %d", size, cells, got, want)
		}
	}
}

// TestManyLayers: a map has at most 16 classes whatever there is, every page has
// one of them, and counts add up.
func TestManyLayers(t *testing.T) {
	const n = 30
	var layers []names.Layer
	s := names.Summary{Absent: 4096, Zero: 8192, Parent: 4096, Duplicate: 4096, Unique: 4096, Unknown: 4096}
	for i := range n {
		layers = append(layers, names.Layer{Title: string(rune('a' + i))})
		s.Layers = append(s.Layers, uint64(i*4096))
	}
	c := classify(s, layers)
	if len(c.list) != api.MaxMapClasses {
		t.Fatalf("%d classes", len(c.list))
	}
	for i := range n {
		class := c.list[c.page(names.OfBlock(names.LayerID(i), 7), true)]
		if large := i >= n-(api.MaxMapClasses-commonClasses); large && (class.Kind != api.KindLayer || class.Title != layers[i].Title) || !large && class.Kind != api.KindOtherLayers {
			t.Errorf("layer %d is %+v", i, class)
		}
	}
	for i, pages := range c.counts(s) {
		if pages*4096 != c.list[i].Bytes {
			t.Errorf("class %+v has %d pages", c.list[i], pages)
		}
	}
	for name, want := range map[names.Name]api.MemoryKind{0: api.KindUnknown, names.ZeroPage: api.KindZero, names.OfPage(3): api.KindDuplicate} {
		if got := c.list[c.page(name, true)].Kind; got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
}

// TestMapCounts: cells of frames count what cells of pages show.
func TestMapCounts(t *testing.T) {
	requireKVM(t)
	c := payloadConfig("spin")
	c.Memory.Size = 4<<30 + 6<<20
	m := newVM(t, c, newConsole())
	random := bytes.Repeat([]byte("0123456789abcdef"), 3*memory.PageSize/16)
	if err := m.mem.WriteAt(random, 4<<30+4<<20); err != nil {
		t.Fatal(err)
	}
	got, err := m.MemoryMap(deadline(t), api.MemoryQuery{Full: true})
	if err != nil {
		t.Fatal(err)
	}
	classes := len(got.Classes)
	if got.CellBytes != memory.LargeFrameSize || len(got.Counts) != (2048+3)*classes*2 || len(got.Frames) != 0 && len(got.Frames) != 2048+3 {
		t.Fatalf("cells of %d, %d bytes of counts, %d frames", got.CellBytes, len(got.Counts), len(got.Frames))
	}
	total, duplicates := uint64(0), uint16(0)
	for i := 0; i < len(got.Counts); i += 2 {
		n := binary.LittleEndian.Uint16(got.Counts[i:])
		total += uint64(n) * memory.PageSize
		if cell := i / 2 / classes; cell == 1536+2 && got.Classes[i/2%classes].Kind == api.KindDuplicate {
			duplicates = n
		}
	}
	if total != uint64(c.Memory.Size) || duplicates != 2 {
		t.Errorf("%d bytes are counted, %d duplicates", total, duplicates)
	}
}
