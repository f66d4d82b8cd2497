package bench

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"
	"time"

	"ditto.vm/guest/payload"
	"ditto.vm/internal/trackertest"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// The guest of framesIdle: what it has read, and what it goes on writing.
const (
	idleRead  = 300 << 20
	idleRate  = 200 // pages a second, one after the other
	idleFor   = 15 * time.Second
	idleEvery = 100 * time.Millisecond
)

// idleNames is the contestant that is what a machine of ditto does: wp-async,
// with the prover of names and the keeper of large frames at work.
const idleNames = "names"

// framesIdle: a guest has read 300 MiB into its page cache and is otherwise
// idle, but for 200 pages a second. Trackers are collected as naming does it,
// which leaves large frames alone while they are being written.
func framesIdle() Benchmark {
	return Benchmark{
		Name:  "frames-idle",
		Title: "Large frames left of a guest that has read 300 MiB and idles for 15 s, while its writes are tracked",
		Where: Native, Rounds: 5, Warmups: 1,
		Metrics: []Metric{
			{"large-host", "%", Higher, "of the guest's frames, mapped by huge pages of the host"},
			{"large-kvm", "%", Higher, "of the guest's frames, mapped by KVM with 2 MiB entries when the guest has read all of them again"},
			{"large-written", "%", Higher, "of the frames that the guest has written meanwhile, mapped by KVM with 2 MiB entries"},
			{"collect", "us", Lower, "what a collection costs the VMM, each 100 ms"},
			{"writes", "/s", Higher, "pages that the guest wrote in a second, of 200 that it wants to"},
		},
		Targets: []Target{
			{Metric: "large-kvm", Contestant: idleNames, Limit: 95},
		},
		OpenLimit: time.Minute, RunLimit: 3 * time.Minute,
		Open: func(_ context.Context, env *Env) (Session, error) {
			return &idleSession{trackers{measure: measureIdle}, env.Scratch}, nil
		},
	}
}

// idleSession adds the names to the trackers.
type idleSession struct {
	trackers
	scratch string
}

// Contestants implements [Session].
func (s *idleSession) Contestants() []Contestant {
	return append(s.trackers.Contestants(), Contestant{idleNames, "memwriter on a bare vCPU, tracker wp-async, names proven and large frames kept"})
}

// Run implements [Session].
func (s *idleSession) Run(ctx context.Context, i int) (Sample, error) {
	if i < len(trackerKinds) {
		return s.trackers.Run(ctx, i)
	}
	sample, err := measureNamed(ctx, s.scratch)
	if errors.Is(err, memory.ErrUnsupported) {
		return Sample{}, nil
	}
	return sample, err
}

// idleGuest is a guest that has read, and has not run since.
func idleGuest(ctx context.Context, kind memory.TrackerKind) (*trackertest.Machine, error) {
	m, err := openGuest(ctx, kind, idleRead, payload.MemWriterConfig{
		WorkingSet: idleRead, Order: payload.Sequential, Words: 1, Seed: 1, Rate: idleRate,
	})
	if err != nil {
		return nil, err
	}
	if err := fillCache(m.Memory, guestBase, idleRead); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// measureNamed lets names be proven and frames be kept while the guest idles.
func measureNamed(ctx context.Context, scratch string) (sample Sample, err error) {
	m, err := idleGuest(ctx, memory.TrackerWPAsync)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	k, err := newNamesKeeper(m, scratch)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	first, err := m.Command(ctx, payload.CommandRun, payload.StateRunning)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	k.run(ctx, idleFor)
	elapsed := time.Since(start)
	last, err := m.Command(ctx, payload.CommandPause, payload.StatePaused)
	if err != nil {
		return nil, err
	}
	if _, err := m.Command(ctx, payload.CommandCheck, payload.StatePaused); err != nil {
		return nil, err
	}
	writes := last.Writes - first.Writes
	if sample, err = idleFrames(m, writes); err != nil {
		return nil, err
	}
	sample["writes"] = float64(writes) / elapsed.Seconds()
	c := collector{m: m}
	return sample, c.finish(ctx)
}

// namesKeeper proves names and keeps frames large, as a machine does.
type namesKeeper struct {
	m      *trackertest.Machine
	table  *names.Table
	frames *memory.Frames
	prover *names.Prover
	keeper *memory.FrameKeeper
	source *os.File
}

// newNamesKeeper says of all that the guest has read that it is the content of a
// file, which holds it.
func newNamesKeeper(m *trackertest.Machine, scratch string) (_ *namesKeeper, err error) {
	k := &namesKeeper{m: m, table: names.NewTable(m.Memory)}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.close())
		}
	}()
	if k.source, err = os.CreateTemp(scratch, "idle-"); err != nil {
		return nil, err
	}
	mem, err := m.Memory.View(guestBase, idleRead)
	if err != nil {
		return nil, err
	}
	if _, err := k.source.Write(mem); err != nil {
		return nil, err
	}
	watched := names.Watch(m.Memory, m.Tracker, k.table)
	m.Memory.SetObserver(watched)
	if k.frames, err = memory.NewFrames(m.Memory, watched); err != nil {
		return nil, err
	}
	id, err := k.table.AddLayer(names.Layer{Title: "cache", Size: idleRead, Immutable: true, Source: k.source})
	if err != nil {
		return nil, err
	}
	for block := range uint64(idleRead / names.BlockSize) {
		k.table.Record(guestBase+memory.GPA(block*memory.PageSize), names.OfBlock(id, block))
	}
	log := slog.New(slog.DiscardHandler)
	k.prover = names.NewProver(m.Memory, k.table, watched, k.frames, names.DefaultProverPolicy(), log)
	k.keeper = memory.NewFrameKeeper(k.frames, memory.DefaultFramePolicy(), log)
	return k, nil
}

// run lets both work for a while.
func (k *namesKeeper) run(ctx context.Context, d time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	var both sync.WaitGroup
	both.Go(func() { k.prover.Run(ctx) })
	both.Go(func() { k.keeper.Run(ctx) })
	both.Wait()
}

func (k *namesKeeper) close() error {
	k.m.Memory.SetObserver(nil)
	var errs []error
	if k.frames != nil {
		errs = append(errs, k.frames.Close())
	}
	if k.source != nil {
		errs = append(errs, k.source.Close(), os.Remove(k.source.Name()))
	}
	return errors.Join(append(errs, k.table.Close())...)
}

func measureIdle(ctx context.Context, kind memory.TrackerKind) (sample Sample, err error) {
	m, err := idleGuest(ctx, kind)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	c := collector{m: m, interval: idleEvery, mode: memory.RearmSmall}
	if err := c.collect(ctx, int(idleFor/idleEvery)); err != nil {
		return nil, err
	}
	// Reading again maps what was unmapped meanwhile, as far as it may.
	if _, err := m.Command(ctx, payload.CommandCheck, payload.StatePaused); err != nil {
		return nil, err
	}
	if sample, err = idleFrames(m, c.writes); err != nil {
		return nil, err
	}
	sample["writes"] = float64(c.writes) / c.elapsed.Seconds()
	if kind != memory.TrackerNone {
		sample["collect"] = microseconds(c.collecting) / float64(idleFor/idleEvery)
	}
	return sample, c.finish(ctx)
}

// idleFrames counts the large frames that are left, when the guest has written
// so many pages.
func idleFrames(m *trackertest.Machine, writes uint64) (Sample, error) {
	usage, err := m.Memory.HostUsage()
	if err != nil {
		return nil, err
	}
	_, large, err := m.Mapped()
	if err != nil {
		return nil, err
	}
	const frames = idleRead / memory.LargeFrameSize
	written := (writes*memory.PageSize + memory.LargeFrameSize - 1) / memory.LargeFrameSize
	percent := func(n, of uint64) float64 { return 100 * min(float64(n)/float64(of), 1) }
	host := usage.AnonHugePages / memory.LargeFrameSize
	// Of what was lost as much as possible is counted as written.
	kept := written - min(frames-min(large, frames), written)
	return Sample{
		"large-host": percent(host, frames), "large-kvm": percent(large, frames),
		"large-written": percent(kept, written),
	}, nil
}

// fillCache writes what a disk would have read, but for the first word of each
// page, which is the program's.
func fillCache(mem *memory.Space, gpa memory.GPA, n int) error {
	const word = 8
	data := make([]byte, memory.PageSize)
	for off := 0; off < n; off += memory.PageSize {
		for i := range data {
			data[i] = byte(i + off/memory.PageSize)
		}
		if err := mem.WriteAt(data[word:], gpa+memory.GPA(off+word)); err != nil {
			return err
		}
	}
	return nil
}
