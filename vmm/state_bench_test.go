package vmm

import (
	"errors"
	"testing"
	"time"

	"ditto.vm/memory"
)

// BenchmarkSaveState measures the state of a paused machine with devices.
func BenchmarkSaveState(b *testing.B) {
	c := fullConfig(b, "spin")
	c.CPUs = 2
	m := newVM(b, c, newConsole())
	if err := errors.Join(m.Start(b.Context()), m.Pause(b.Context())); err != nil {
		b.Fatal(err)
	}
	size := 0
	for b.Loop() {
		sections, err := m.SaveState(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		size = 0
		for _, s := range sections {
			size += len(s.Bytes)
		}
	}
	b.ReportMetric(float64(size), "state-bytes")
}

// BenchmarkRestore measures the making of a machine with devices out of a state
// up to its first instruction, without its memory; new is the making of the
// machine that is booted.
func BenchmarkRestore(b *testing.B) {
	c, sections := savedFull(b)
	b.Run("decode", func(b *testing.B) {
		for b.Loop() {
			if _, err := decodeState(sections, &c); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("restore", func(b *testing.B) {
		var resumed time.Duration
		for b.Loop() {
			m, err := Restore(b.Context(), c, sections, func(*memory.Space) error { return nil }, RestoreOptions{Options: quiet()})
			if err != nil {
				b.Fatal(err)
			}
			begin := time.Now()
			if err := m.Resume(b.Context()); err != nil {
				b.Fatal(err)
			}
			resumed += time.Since(begin)
			b.StopTimer()
			if err := m.Close(); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
		b.ReportMetric(float64(resumed.Microseconds())/float64(b.N), "us-resume/op")
	})
	b.Run("new", func(b *testing.B) {
		for b.Loop() {
			m, err := New(b.Context(), c, quiet())
			if err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			if err := m.Close(); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	})
}
