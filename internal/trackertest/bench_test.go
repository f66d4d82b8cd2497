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
	m.Start()
	// Populated and large first, by the check, which reads every page.
	m.command(payload.CommandCheck, payload.StatePaused)
	fillGuest(b, m, working)
	all := m.Memory.Regions()[0].Range
	tracked := kind != memory.TrackerNone
	set := m.Memory.NewPageSet()
	if tracked {
		if err := m.Tracker.Arm(all); err != nil {
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
		if err := m.Tracker.Collect(all, set, memory.Rearm); err != nil {
			b.Fatal(err)
		}
		collecting += time.Since(before)
		pages += set.Count()
	}
	elapsed := time.Since(start)
	_, large := m.mapped()
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

// BenchmarkQuietGuest: a guest of 1 GiB, all of it written before it was armed,
// writes 200 pages a second from then on, most of them in an eighth of its memory.
// One iteration is a round of collecting in each tenth of a second. It reports
// what a round costs, and how much is mapped large in the end, by the host and,
// after the guest has read all of it, by KVM.
func BenchmarkQuietGuest(b *testing.B) {
	for _, kind := range []memory.TrackerKind{memory.TrackerNone, memory.TrackerWPAsync, memory.TrackerKVMLog, memory.TrackerKVMRing} {
		b.Run(kind.String(), func(b *testing.B) { benchQuietGuest(b, kind) })
	}
}

func benchQuietGuest(b *testing.B, kind memory.TrackerKind) {
	const working, rate = 1 << 30, 200
	m := newMachine(b, memory.Config{Size: guestStart + working}, kind)
	m.load(payload.MemWriterConfig{WorkingSet: working, Order: payload.Hot, Words: 1, Seed: 1, Rate: rate})
	for gpa := memory.GPA(guestStart); gpa < guestStart+working; gpa += frame {
		if err := m.Memory.WriteAt(make([]byte, 1), gpa); err != nil {
			b.Fatal(err)
		}
	}
	m.Start()
	m.command(payload.CommandCheck, payload.StatePaused) // KVM maps all of it
	all, set := m.Memory.Regions()[0].Range, m.Memory.NewPageSet()
	if err := m.Tracker.Arm(all); err != nil {
		b.Fatal(err)
	}
	m.command(payload.CommandRun, payload.StateRunning)
	collecting := time.Duration(0)
	for b.Loop() {
		time.Sleep(100 * time.Millisecond)
		before := time.Now()
		if err := m.Tracker.Collect(all, set, memory.RearmSmall); err != nil {
			b.Fatal(err)
		}
		collecting += time.Since(before)
	}
	m.command(payload.CommandCheck, payload.StatePaused)
	usage, err := m.Memory.HostUsage()
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(collecting.Nanoseconds())/float64(b.N), "ns/collect")
	b.ReportMetric(100*float64(usage.AnonHugePages)/working, "%large-host")
	_, large := m.mapped()
	b.ReportMetric(100*float64(large)/(working/frame), "%large-kvm")
	b.ReportMetric(0, "ns/op")
	m.finish()
}
