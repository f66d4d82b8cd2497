package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/images/index"
	"ditto.vm/images/layer"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// The contestants of the naming pass are what decides about its pages.
const (
	byTracker = "tracker"
	byFilter  = "pre-filter"
	byBLAKE3  = "blake3"
)

// namingPass: how fast memory is named, by what decides.
func namingPass() Benchmark {
	return Benchmark{
		Name:  "naming-pass",
		Title: "Naming all of a paused VM's memory, by what decides about its pages",
		Where: Native, Rounds: 9, Warmups: 1,
		Metrics: []Metric{
			{"rate", "GiB/s", Higher, "memory named in a second of one core's time"},
			{"all-cores", "GiB/s", Higher, "memory named in a second by all cores of the host"},
		},
		Targets: []Target{
			{Metric: "rate", Contestant: byTracker, Limit: 200},
			{Metric: "rate", Contestant: byFilter, Limit: 6},
			{Metric: "rate", Contestant: byBLAKE3, Limit: 1.2},
		},
		OpenLimit: 3 * time.Minute, RunLimit: time.Minute,
		Open: func(ctx context.Context, env *Env) (Session, error) {
			n := &naming{memory: namingMemory, other: namingOther, least: namingTime}
			if err := n.open(ctx, env.Scratch); err != nil {
				return nil, errors.Join(err, n.Close())
			}
			return n, nil
		},
	}
}

// Sizes in bytes: memory is far more than a cache holds, and the other layer
// has a filter that does not fit beside it in a core's own.
const (
	namingMemory = 512 << 20
	namingOther  = 1 << 30
	namingTime   = 500 * time.Millisecond
)

// naming is a memory that equals a layer, page for page, and a layer that holds
// nothing of it.
type naming struct {
	memory  uint64        // bytes
	other   int64         // bytes of the layer that holds nothing of it
	least   time.Duration // for how long passes are repeated
	dir     string
	space   *memory.Space
	tracker memory.Tracker
	frames  *memory.Frames
	prover  *names.Prover
	table   *names.Table
	layers  map[string]names.Layer
	closers []io.Closer
}

// Contestants implements [Session].
func (*naming) Contestants() []Contestant {
	return []Contestant{
		{byTracker, "every page was compared with its block before, and not written since: the tracker is asked"},
		{byFilter, "an index holds no page of it: one XXH3 a page, and comparing pages with each other"},
		{byBLAKE3, "an index holds every page of it"},
	}
}

func (n *naming) open(ctx context.Context, scratch string) (err error) {
	if n.dir, err = os.MkdirTemp(scratch, "naming-"); err != nil {
		return err
	}
	if n.space, err = memory.New(memory.Config{Size: n.memory}); err != nil {
		return err
	}
	mem, err := n.space.Writable(0, n.memory)
	if err != nil {
		return err
	}
	equal, err := n.layer(ctx, "equal", 1, int64(n.memory))
	if err != nil {
		return err
	}
	other, err := n.layer(ctx, "other", 2, n.other)
	if err != nil {
		return err
	}
	n.layers = map[string]names.Layer{byBLAKE3: equal, byFilter: other}
	if _, err := equal.Source.ReadAt(mem, 0); err != nil {
		return err
	}
	return n.prove(ctx, equal)
}

// layer makes a file of random bytes and its index.
func (n *naming) layer(ctx context.Context, name string, seed uint64, size int64) (names.Layer, error) {
	path := filepath.Join(n.dir, name)
	f, err := os.Create(path)
	if err != nil {
		return names.Layer{}, err
	}
	rng := rand.NewChaCha8([32]byte{byte(seed)})
	_, err = io.Copy(f, io.LimitReader(rng, size))
	if err := errors.Join(err, f.Close()); err != nil {
		return names.Layer{}, err
	}
	src, err := layer.OpenFile(path)
	if err != nil {
		return names.Layer{}, err
	}
	n.closers = append(n.closers, src)
	if _, err := index.Build(ctx, src, index.Beside(path), index.Options{}); err != nil {
		return names.Layer{}, err
	}
	x, err := index.Open(index.Beside(path))
	if err != nil {
		return names.Layer{}, err
	}
	n.closers = append(n.closers, x)
	return names.Layer{Title: name, Size: size, Immutable: true, Source: src, Index: x}, nil
}

// prove records the name of every page and lets the prover prove them.
func (n *naming) prove(ctx context.Context, equal names.Layer) (err error) {
	if n.tracker, _, err = memory.OpenTracker(n.space, memory.TrackerWPAsync, memory.TrackerHost{}); err != nil {
		if errors.Is(err, memory.ErrUnsupported) {
			return &Unavailable{Reason: err.Error()}
		}
		return err
	}
	if n.frames, err = memory.NewFrames(n.space, n.tracker); err != nil {
		return err
	}
	n.table = names.NewTable(n.space)
	watched := names.Watch(n.space, n.tracker, n.table)
	n.space.SetObserver(watched)
	id, err := n.table.AddLayer(equal)
	if err != nil {
		return err
	}
	for block := range n.memory / names.BlockSize {
		n.table.Record(memory.GPA(block*memory.PageSize), names.OfBlock(id, block))
	}
	policy := names.DefaultProverPolicy()
	policy.Quiet, policy.Hashes, policy.Read = 0, int(n.memory/memory.LargeFrameSize), int64(n.memory)
	n.prover = names.NewProver(n.space, n.table, watched, n.frames, policy, slog.New(slog.DiscardHandler))
	for pages := n.memory / memory.PageSize; n.table.Stats().NamedProven < pages; {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("%d of %d pages are proven: %w", n.table.Stats().NamedProven, pages, err)
		}
		if _, err := n.prover.Step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Run implements [Session].
func (n *naming) Run(ctx context.Context, contestant int) (Sample, error) {
	p := names.Pass{Space: n.space}
	want := func(s names.Summary) uint64 { return s.Layers[0] }
	switch name := n.Contestants()[contestant].Name; name {
	case byTracker:
		p.Table, p.Layers = n.table, n.table.Layers()
	case byFilter:
		want = func(s names.Summary) uint64 { return s.Unique }
		fallthrough
	default:
		p.Layers = []names.Layer{n.layers[name]}
	}
	_, cores, err := n.repeat(ctx, p, want)
	if err != nil {
		return nil, err
	}
	p.Workers = 1
	rate, _, err := n.repeat(ctx, p, want)
	if err != nil {
		return nil, err
	}
	return Sample{"rate": rate, "all-cores": cores}, nil
}

// repeat names memory for a while and returns the rate by the processor's time
// and by the clock, in GiB/s.
func (n *naming) repeat(ctx context.Context, p names.Pass, want func(names.Summary) uint64) (byCPU, byClock float64, err error) {
	var m *names.Map
	passes := 0
	start, cpu := time.Now(), processTime()
	for passes == 0 || time.Since(start) < n.least {
		if p.Table != nil {
			if err := n.prover.Settle(ctx); err != nil {
				return 0, 0, err
			}
		}
		if m, err = p.Run(ctx); err != nil {
			return 0, 0, err
		}
		passes++
	}
	gib := float64(passes) * float64(n.memory) / (1 << 30)
	byCPU, byClock = gib/(processTime()-cpu).Seconds(), gib/time.Since(start).Seconds()
	if got := want(m.Summary()); got != n.memory {
		return 0, 0, fmt.Errorf("%d bytes of %d were named as they should be", got, n.memory)
	}
	return byCPU, byClock, nil
}

// processTime returns the time that all cores gave this process.
func processTime() time.Duration {
	var u unix.Rusage
	// It fails only for a bad argument.
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// Close implements [Session].
func (n *naming) Close() error {
	var errs []error
	if n.frames != nil {
		errs = append(errs, n.frames.Close())
	}
	if n.space != nil {
		n.space.SetObserver(nil)
	}
	if n.tracker != nil {
		errs = append(errs, n.tracker.Close())
	}
	if n.space != nil {
		errs = append(errs, n.space.Close())
	}
	for _, c := range n.closers {
		errs = append(errs, c.Close())
	}
	if n.dir != "" {
		errs = append(errs, os.RemoveAll(n.dir))
	}
	return errors.Join(errs...)
}
