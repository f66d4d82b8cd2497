package trackertest_test

import (
	"fmt"
	"testing"
	"time"

	"ditto.vm/guest/payload"
	"ditto.vm/memory"
)

// BenchmarkGuestWrites lets a vCPU write pages at random at full speed while all
// of memory is armed and collected at each interval. One iteration is one
// interval. It reports:
//
//	writes/s    by the guest
//	ns/collect  what a round costs the VMM
//	pages/round found written
//	%large      of the working set's frames that KVM maps with 2 MiB at the end
//
// The tracker none is not armed: it is the guest left alone.
func BenchmarkGuestWrites(b *testing.B) {
	for _, mib := range []uint64{16, 256} {
		for _, interval := range []time.Duration{10 * time.Millisecond, 100 * time.Millisecond} {
			for _, kind := range []memory.TrackerKind{memory.TrackerNone, memory.TrackerWPAsync, memory.TrackerKVMLog, memory.TrackerKVMRing} {
				b.Run(fmt.Sprintf("%dMiB/%s/%s", mib, interval, kind), func(b *testing.B) {
					benchGuestWrites(b, kind, mib<<20, interval)
				})
			}
		}
	}
}

func benchGuestWrites(b *testing.B, kind memory.TrackerKind, working uint64, interval time.Duration) {
	m := newMachine(b, memory.Config{Size: guestStart + working}, kind)
	m.load(payload.MemWriterConfig{WorkingSet: working, Order: payload.Random, Words: 1, Seed: 1})
	m.start()
	// Populated and large first, by the check, which reads every page.
	m.command(payload.CommandCheck, payload.StatePaused)
	fillGuest(b, m, working)
	all := m.mem.Regions()[0].Range
	tracked := kind != memory.TrackerNone
	set := m.mem.NewPageSet()
	if tracked {
		if err := m.tracker.Arm(all); err != nil {
			b.Fatal(err)
		}
	}
	first := m.command(payload.CommandRun, payload.StateRunning)
	start, collecting, pages := time.Now(), time.Duration(0), uint64(0)
	for b.Loop() {
		time.Sleep(interval)
		if !tracked {
			continue
		}
		set.Clear()
		before := time.Now()
		if err := m.tracker.Collect(all, set, memory.Rearm); err != nil {
			b.Fatal(err)
		}
		collecting += time.Since(before)
		pages += set.Count()
	}
	elapsed := time.Since(start)
	large := m.largeInKVM()
	last := m.command(payload.CommandPause, payload.StatePaused)
	b.ReportMetric(float64(last.Writes-first.Writes)/elapsed.Seconds(), "writes/s")
	b.ReportMetric(float64(collecting.Nanoseconds())/float64(b.N), "ns/collect")
	b.ReportMetric(float64(pages)/float64(b.N), "pages/round")
	b.ReportMetric(100*float64(large)/float64(working/frame), "%large")
	b.ReportMetric(0, "ns/op")
	m.command(payload.CommandRun, payload.StateRunning)
	m.finish()
}

// fillGuest lets the guest run until it has written about every frame.
func fillGuest(b *testing.B, m *machine, working uint64) {
	b.Helper()
	m.command(payload.CommandRun, payload.StateRunning)
	m.await(func(s payload.MemWriterStatus) bool { return s.Writes > 20*working/frame })
	m.command(payload.CommandPause, payload.StatePaused)
}

// BenchmarkIdleGuest: 1 GiB of which the guest writes one frame in 64 while all
// is armed. It shows what tracking costs memory that nobody writes.
func BenchmarkIdleGuest(b *testing.B) {
	for _, kind := range []memory.TrackerKind{memory.TrackerWPAsync, memory.TrackerKVMLog, memory.TrackerKVMRing} {
		b.Run(kind.String(), func(b *testing.B) {
			const size = 1 << 30
			m := newMachine(b, memory.Config{Size: size}, kind)
			mem, err := m.mem.Writable(0, size)
			if err != nil {
				b.Fatal(err)
			}
			for off := 0; off < size; off += page {
				mem[off] = 1
			}
			clear(mem[guestStart:][:size/64])
			m.load(payload.MemWriterConfig{WorkingSet: size / 64, Order: payload.Random, Words: 1, Seed: 1})
			all := m.mem.Regions()[0].Range
			if err := m.tracker.Arm(all); err != nil {
				b.Fatal(err)
			}
			m.start()
			set := m.mem.NewPageSet()
			for b.Loop() {
				set.Clear()
				if err := m.tracker.Collect(all, set, memory.Rearm); err != nil {
					b.Fatal(err)
				}
			}
			usage, err := m.mem.HostUsage()
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(100*float64(usage.AnonHugePages)/size, "%large-host")
			m.finish()
		})
	}
}
