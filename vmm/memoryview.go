package vmm

import (
	"context"
	"fmt"
	"time"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/vmm/api"
)

// unnamed is the book of a VM without names.
type unnamed struct{}

// At implements [names.Recorded].
func (unnamed) At(memory.GFN) names.Name { return 0 }

// Load implements [names.Recorded].
func (unnamed) Load(dst []names.Name, _ memory.GFN) { clear(dst) }

// book returns what is recorded of memory, and the layers that names number.
func (m *VM) book() (names.Recorded, []names.Layer) {
	if m.naming == nil {
		return unnamed{}, nil
	}
	return m.naming.Table(), m.naming.Table().Layers()
}

// settle makes true what the book says is proven, when nothing runs.
func (m *VM) settle(ctx context.Context, still bool) error {
	if m.naming == nil || !still {
		return nil
	}
	return m.naming.Settle(ctx)
}

// Memory says what guest memory equals and how it is mapped.
func (m *VM) Memory(ctx context.Context, q api.MemoryQuery) (api.Memory, error) {
	var out api.Memory
	exact, err := m.look(ctx, q.Pause, func(ctx context.Context, still bool) error {
		began := time.Now()
		summary, stats, layers, err := m.summarize(ctx, q.Full, still)
		if err != nil {
			return err
		}
		out = memorySummary(summary, stats, layers)
		if err := m.describeMapping(&out); err != nil {
			return err
		}
		out.DurMs = time.Since(began).Milliseconds()
		return nil
	})
	if err != nil {
		return api.Memory{}, fmt.Errorf("look at memory: %w", err)
	}
	out.Mode, out.Exact = memoryMode(q), exact
	return out, nil
}

func memoryMode(q api.MemoryQuery) api.MemoryMode {
	if q.Full {
		return api.MemoryFull
	}
	return api.MemoryQuick
}

// summarize counts memory, from the book alone or by a pass.
func (m *VM) summarize(ctx context.Context, full, still bool) (names.Summary, names.PassStats, []names.Layer, error) {
	if err := m.settle(ctx, still); err != nil {
		return names.Summary{}, names.PassStats{}, nil, err
	}
	if full {
		all, err := m.namePages(ctx, still, nil)
		if err != nil {
			return names.Summary{}, names.PassStats{}, nil, err
		}
		return all.Summary(), all.Stats(), all.Layers(), nil
	}
	table, layers := m.book()
	summary, err := names.Glance(m.mem, table, layers)
	return summary, names.PassStats{}, layers, err
}

// namePages passes over all of memory, and keeps what it finds. A running guest
// keeps half of the cores. progress hears how many bytes are done, if not nil.
func (m *VM) namePages(ctx context.Context, still bool, progress func(done, total uint64)) (*names.Map, error) {
	if m.naming != nil {
		m.naming.CheckIndexes()
	}
	for {
		table, layers := m.book()
		pass := names.Pass{Space: m.mem, Table: table, Layers: layers, Running: !still, Progress: progress}
		if !still {
			pass.Workers = liveWorkers()
		}
		all, err := pass.Run(ctx)
		switch {
		case err != nil || m.naming == nil:
			return all, err
		case m.naming.CheckIndexes():
			continue // what a changed index said is worth nothing
		}
		all.Teach(m.naming.Table())
		return all, nil
	}
}

// memorySummary is a summary as the API tells it.
func memorySummary(s names.Summary, stats names.PassStats, layers []names.Layer) api.Memory {
	out := api.Memory{
		Bytes: s.Bytes, NotPopulatedBytes: s.Absent, ZeroBytes: s.Zero, ParentBytes: s.Parent,
		DuplicateBytes: s.Duplicate, UniqueBytes: s.Unique, UnknownBytes: s.Unknown,
		Layers: []api.MemoryLayer{}, Steps: []api.MemoryStep{},
	}
	for i, l := range layers {
		out.Layers = append(out.Layers, api.MemoryLayer{
			Title: l.Title, Bytes: s.Layers[i], SizeBytes: uint64(max(l.Size, 0)), Immutable: l.Immutable, Indexed: l.Index != nil,
		})
	}
	for _, step := range stats.Steps {
		out.Steps = append(out.Steps, api.MemoryStep{
			Name: step.Step.String(), Bytes: step.Named, DurMs: float64(step.Time) / float64(time.Millisecond),
		})
	}
	return out
}

// describeMapping adds how host and KVM map memory, and who tracks it.
func (m *VM) describeMapping(out *api.Memory) error {
	if err := m.refreshFrames(); err != nil {
		return err
	}
	if m.frames != nil {
		out.Frames = frameCensus(m.frames.Census())
	}
	if m.stats != nil {
		values, err := m.stats.Read()
		if err != nil {
			return err
		}
		out.Pages4K, out.Pages2M, out.Pages1G = values["pages_4k"], values["pages_2m"], values["pages_1g"]
	}
	armed, err := m.armedBytes()
	if err != nil {
		return err
	}
	kind := m.tracker.Kind()
	out.Names = m.nameCounters()
	out.Tracker = api.MemoryTracker{Kind: kind.String(), Sees: kind.Sees(), Misses: kind.Misses(), ArmedBytes: armed}
	return nil
}

func (m *VM) refreshFrames() error {
	if m.frames == nil {
		return nil
	}
	for _, r := range m.mem.Regions() {
		if err := m.frames.Refresh(r.Range); err != nil {
			return err
		}
	}
	return nil
}

func frameCensus(c memory.Census) api.MemoryFrames {
	out := api.MemoryFrames{
		Total: uint64(c.Frames), Large: uint64(c.Large()), Small: uint64(c.Small()), Empty: uint64(c.Empty()),
		Reasons: map[string]uint64{"unexplained": uint64(c.Unexplained)},
	}
	for _, r := range []memory.FrameReasons{
		memory.ReasonShared, memory.ReasonRemap, memory.ReasonBalloon, memory.ReasonTracking, memory.ReasonPartial,
	} {
		out.Reasons[r.String()] = uint64(c.Because(r))
	}
	return out
}

// armedBytes counts the populated memory that the tracker does not report as
// written.
func (m *VM) armedBytes() (uint64, error) {
	if m.tracker.Kind() == memory.TrackerNone {
		return 0, nil
	}
	written := m.mem.NewPageSet()
	armed := uint64(0)
	for _, r := range m.mem.Regions() {
		if err := m.tracker.Collect(r.Range, written, memory.Peek); err != nil {
			return 0, err
		}
		err := m.mem.Populated(r.Range, func(run memory.Range) {
			armed += run.Size - written.CountIn(run.Start, run.Size)*memory.PageSize
		})
		if err != nil {
			return 0, err
		}
	}
	return armed, nil
}

// nameCounters is what the book of names counted.
func (m *VM) nameCounters() api.MemoryNames {
	if m.naming == nil {
		return api.MemoryNames{Counters: map[string]uint64{}}
	}
	s := m.naming.Stats()
	return api.MemoryNames{Enabled: true, Counters: map[string]uint64{
		"named": s.Named, "named_proven": s.NamedProven,
		"recorded": s.Recorded, "missed": s.Missed, "proven": s.Proven, "refuted": s.Refuted, "demoted": s.Demoted,
		"dropped_io": s.DroppedIO, "dropped_write": s.DroppedWrite, "dropped_erase": s.DroppedErase,
		"dropped_host": s.DroppedHost, "dropped_written": s.DroppedWritten, "dropped_resize": s.DroppedResize,
	}}
}
