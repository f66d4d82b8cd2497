package bench

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ditto.vm/guest/payload"
	"ditto.vm/internal/trackertest"
	"ditto.vm/memory"
	"ditto.vm/vmm/kvm"
)

// trackerKinds are the contestants, in the order of the tables: the guest left
// alone first.
var trackerKinds = []memory.TrackerKind{
	memory.TrackerNone, memory.TrackerWPAsync, memory.TrackerKVMLog, memory.TrackerKVMRing,
}

// intervals are how often the written pages are collected, and for how many
// rounds.
var intervals = []struct {
	name   string
	every  time.Duration
	rounds int
}{
	{"10ms", 10 * time.Millisecond, 50},
	{"100ms", 100 * time.Millisecond, 8},
	{"1s", time.Second, 2},
}

// trackerSizes are the working sets, in MiB.
var trackerSizes = []uint64{16, 64, 256, 1024}

// guestFault is the shortest gap between two writes of the guest that counts as
// a fault: several times a miss of TLB and caches, less than any fault.
const guestFault = 600 * time.Nanosecond

// trackerWrites is one benchmark for each working set: a vCPU that writes pages
// at random at full speed, while each tracker has all of memory armed.
func trackerWrites() []Benchmark {
	var list []Benchmark
	for _, mib := range trackerSizes {
		b := Benchmark{
			Name:  fmt.Sprintf("tracker-%dM", mib),
			Title: fmt.Sprintf("A vCPU writes %d MiB at random at full speed while every write is tracked", mib),
			Where: Native, Rounds: 5, Warmups: 1,
			OpenLimit: time.Minute, RunLimit: 3 * time.Minute,
			Open: func(context.Context, *Env) (Session, error) {
				return &trackers{measure: func(ctx context.Context, kind memory.TrackerKind) (Sample, error) {
					return measureWrites(ctx, kind, mib<<20)
				}}, nil
			},
		}
		for _, i := range intervals {
			b.Metrics = append(b.Metrics,
				Metric{"writes-" + i.name, "k/s", Higher, "thousands of pages that the guest writes in a second, collected each " + i.name},
				Metric{"collect-" + i.name, "us", Lower, "what a collection costs the VMM: look, report, arm again"},
				Metric{"large-" + i.name, "%", Higher, "of the working set mapped by KVM with 2 MiB entries in the end"})
		}
		b.Metrics = append(b.Metrics, Metric{"fault", "us", Lower,
			fmt.Sprintf("what a tracked write costs the guest: its gaps of %s or more, by the pages reported, collected each %s", guestFault, faultInterval)})
		list = append(list, b)
	}
	return list
}

// faultInterval is the interval at which the cost of a fault is taken: long
// enough that collecting itself does not disturb the guest much.
const faultInterval = "100ms"

// trackers is a session whose contestants are trackers.
type trackers struct {
	measure func(context.Context, memory.TrackerKind) (Sample, error)
}

// Contestants implements [Session].
func (s *trackers) Contestants() []Contestant {
	list := make([]Contestant, len(trackerKinds))
	for i, k := range trackerKinds {
		list[i] = Contestant{k.String(), "memwriter on a bare vCPU, tracker " + k.String()}
	}
	return list
}

// Run implements [Session]. A tracker that this host lacks measures nothing.
func (s *trackers) Run(ctx context.Context, i int) (Sample, error) {
	sample, err := s.measure(ctx, trackerKinds[i])
	if errors.Is(err, memory.ErrUnsupported) {
		return Sample{}, nil
	}
	return sample, err
}

// Close implements [Session]: each run takes its machine with it.
func (s *trackers) Close() error { return nil }

// measureWrites takes a new machine for each interval, so that each begins with
// memory that is mapped large.
func measureWrites(ctx context.Context, kind memory.TrackerKind, working uint64) (Sample, error) {
	sample := Sample{}
	for _, i := range intervals {
		m, err := openGuest(ctx, kind, working, payload.MemWriterConfig{
			WorkingSet: working, Order: payload.Random, Words: 1, Seed: 1, Stall: guestFault,
		})
		if err != nil {
			return nil, err
		}
		c := collector{m: m, interval: i.every, mode: memory.Rearm}
		err = c.collect(ctx, i.rounds)
		if err == nil {
			err = c.finish(ctx)
		}
		if err := errors.Join(err, m.Close()); err != nil {
			return nil, err
		}
		sample["writes-"+i.name] = float64(c.writes) / 1000 / c.elapsed.Seconds()
		sample["large-"+i.name] = 100 * float64(c.large) / float64(working/memory.LargeFrameSize)
		if kind == memory.TrackerNone {
			continue
		}
		sample["collect-"+i.name] = microseconds(c.collecting) / float64(i.rounds)
		if i.name == faultInterval {
			sample["fault"] = microseconds(c.stalled) / float64(max(c.pages, 1))
		}
	}
	return sample, nil
}

func microseconds(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// guestBase is where the working set of a memory writer begins.
const guestBase = 4 << 20

// openGuest starts a memory writer in memory that is populated and mapped large
// by host and KVM. The program is paused, and nothing is armed.
func openGuest(ctx context.Context, kind memory.TrackerKind, size uint64, work payload.MemWriterConfig) (m *trackertest.Machine, err error) {
	m, err = trackertest.OpenMachine(trackertest.MachineConfig{
		Memory: memory.Config{Size: guestBase + size}, Tracker: kind,
	})
	if errors.Is(err, kvm.ErrNoDevice) || errors.Is(err, kvm.ErrPermission) {
		return nil, &Unavailable{Reason: err.Error()}
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	if err := m.Load(work); err != nil {
		return nil, err
	}
	for gpa := memory.GPA(guestBase); gpa < memory.GPA(guestBase+size); gpa += memory.LargeFrameSize {
		if err := m.Memory.WriteAt([]byte{0}, gpa); err != nil {
			return nil, err
		}
	}
	m.Start()
	// The check reads all of the working set: KVM maps it.
	if _, err := m.Command(ctx, payload.CommandCheck, payload.StatePaused); err != nil {
		return nil, err
	}
	return m, nil
}

// collector lets a guest write and collects what it wrote.
type collector struct {
	m        *trackertest.Machine
	interval time.Duration
	mode     memory.CollectMode

	elapsed, collecting, stalled time.Duration
	writes, pages, large         uint64
}

// collect arms all of memory, lets the guest run for so many rounds and pauses
// it.
func (c *collector) collect(ctx context.Context, rounds int) error {
	all, set := c.m.Memory.Regions()[0].Range, c.m.Memory.NewPageSet()
	if err := c.m.Tracker.Arm(all); err != nil {
		return err
	}
	first, err := c.m.Command(ctx, payload.CommandRun, payload.StateRunning)
	if err != nil {
		return err
	}
	start := time.Now()
	tick := time.NewTicker(c.interval)
	defer tick.Stop()
	for range rounds {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if c.m.Tracker.Kind() == memory.TrackerNone {
			continue
		}
		set.Clear()
		before := time.Now()
		if err := c.m.Tracker.Collect(all, set, c.mode); err != nil {
			return err
		}
		c.collecting += time.Since(before)
		c.pages += set.Count()
	}
	c.elapsed = time.Since(start)
	last, err := c.m.Command(ctx, payload.CommandPause, payload.StatePaused)
	if err != nil {
		return err
	}
	c.writes, c.stalled = last.Writes-first.Writes, last.Stalled-first.Stalled
	_, c.large, err = c.m.Mapped()
	return err
}

// finish lets the guest check its memory and end.
func (c *collector) finish(ctx context.Context) error {
	if _, err := c.m.Command(ctx, payload.CommandRun, payload.StateRunning); err != nil {
		return err
	}
	_, err := c.m.Finish(ctx)
	return err
}
