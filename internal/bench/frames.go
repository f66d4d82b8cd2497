package bench

import (
	"context"
	"errors"
	"time"

	"ditto.vm/guest/payload"
	"ditto.vm/internal/trackertest"
	"ditto.vm/memory"
)

// The guest of framesIdle: what it has read, and what it goes on writing.
const (
	idleRead  = 300 << 20
	idleRate  = 200 // pages a second, one after the other
	idleFor   = 5 * time.Second
	idleEvery = 100 * time.Millisecond
)

// framesIdle: a guest has read 300 MiB into its page cache and is otherwise
// idle, but for 200 pages a second. Trackers are collected as naming does it,
// which leaves large frames alone while they are being written.
func framesIdle() Benchmark {
	return Benchmark{
		Name:  "frames-idle",
		Title: "Large frames left of a guest that has read 300 MiB and idles for 5 s, while its writes are tracked",
		Where: Native, Rounds: 5, Warmups: 1,
		Metrics: []Metric{
			{"large-host", "%", Higher, "of the guest's frames, mapped by huge pages of the host"},
			{"large-kvm", "%", Higher, "of the guest's frames, mapped by KVM with 2 MiB entries when the guest has read all of them again"},
			{"large-written", "%", Higher, "of the frames that the guest has written meanwhile, mapped by KVM with 2 MiB entries"},
			{"collect", "us", Lower, "what a collection costs the VMM, each 100 ms"},
			{"writes", "/s", Higher, "pages that the guest wrote in a second, of 200 that it wants to"},
		},
		Targets: []Target{
			{Metric: "large-kvm", Contestant: memory.TrackerWPAsync.String(), Limit: 95},
		},
		OpenLimit: time.Minute, RunLimit: 3 * time.Minute,
		Open: func(context.Context, *Env) (Session, error) { return &trackers{measure: measureIdle}, nil },
	}
}

func measureIdle(ctx context.Context, kind memory.TrackerKind) (sample Sample, err error) {
	m, err := openGuest(ctx, kind, idleRead, payload.MemWriterConfig{
		WorkingSet: idleRead, Order: payload.Sequential, Words: 1, Seed: 1, Rate: idleRate,
	})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if err := fillCache(m.Memory, guestBase, idleRead); err != nil {
		return nil, err
	}
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
