package vmm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/memory"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/config"
)

// savedSized returns a snapshot of a machine with so much memory, of which every
// page but each nth holds bytes of its own; with n 0 all do.
func savedSized(b *testing.B, size uint64, n int) (config.Config, string) {
	b.Helper()
	c := fullConfig(b, "spin")
	c.Disks[0].ReadOnly = true
	c.Memory.Size = config.Bytes(size)
	m := newVM(b, c, newConsole())
	if err := errors.Join(m.Start(b.Context()), m.Pause(b.Context())); err != nil {
		b.Fatal(err)
	}
	for _, r := range m.mem.Regions() {
		mem, err := m.mem.Writable(r.Start, r.Size)
		if err != nil {
			b.Fatal(err)
		}
		for at := 4 << 20; at < len(mem); at += memory.PageSize {
			if page := uint64(r.Start)/memory.PageSize + uint64(at)/memory.PageSize; n == 0 || page%uint64(n) != 0 {
				binary.LittleEndian.PutUint64(mem[at:], page)
			}
		}
	}
	dir := filepath.Join(quickDir(b), "snap")
	snapshotOf(b, m, dir, snapshot.None)
	if err := m.Close(); err != nil {
		b.Fatal(err)
	}
	return c, dir
}

// cpuTime is what the process has used of the cores, whatever else runs there.
func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkRestoreSnapshot measures a restore from the request to the guest's
// first instruction, in a process that runs: of memory that is mapped in long
// rows, and of memory that is fetched by pages.
func BenchmarkRestoreSnapshot(b *testing.B) {
	for _, layout := range []struct {
		name string
		n    int
	}{{"rows", 0}, {"scattered", 8}} {
		for _, size := range []uint64{256 << 20, 4 << 30} {
			b.Run(fmt.Sprintf("%s/%dM", layout.name, size>>20), func(b *testing.B) {
				c, dir := savedSized(b, size, layout.n)
				var open, made, cpu time.Duration
				for b.Loop() {
					began, used := time.Now(), cpuTime(b)
					s, err := snapshot.Open(dir, snapshot.OpenOptions{})
					if err != nil {
						b.Fatal(err)
					}
					open += time.Since(began)
					m, err := RestoreSnapshot(b.Context(), s, SnapshotOptions{Config: c, RestoreOptions: RestoreOptions{Options: quiet()}})
					if err != nil {
						b.Fatal(err)
					}
					made += time.Since(began)
					if err := m.Resume(b.Context()); err != nil {
						b.Fatal(err)
					}
					cpu += cpuTime(b) - used
					b.StopTimer()
					if err := m.Close(); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
				b.ReportMetric(float64(cpu.Microseconds())/float64(b.N), "us-cpu/op")
				b.ReportMetric(float64(open.Microseconds())/float64(b.N), "us-open/op")
				b.ReportMetric(float64((made-open).Microseconds())/float64(b.N), "us-make/op")
			})
		}
	}
}
