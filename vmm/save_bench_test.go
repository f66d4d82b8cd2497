package vmm

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ditto.vm/memory"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/savehost"
)

// BenchmarkSave reports how long a guest stands still when it is saved while it
// runs: of memory that it has used once, some of which it writes all the time.
func BenchmarkSave(b *testing.B) {
	for _, used := range []uint64{256 << 20, 2 << 30} {
		for _, spec := range []string{"memwriter:size=1M,words=8,rate=1000", "memwriter:size=16M,words=8,order=random"} {
			b.Run(fmt.Sprintf("%dMiB,%s", used>>20, spec), func(b *testing.B) {
				c := payloadConfig(spec)
				c.Memory.Size = config.Bytes(used + 64<<20)
				disk := filepath.Join(b.TempDir(), "disk.img")
				if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
					b.Fatal(err)
				}
				c.Disks = []config.Disk{{Path: disk}}
				m := newVM(b, c, newConsole())
				for at := memory.GPA(64 << 20); at < memory.GPA(c.Memory.Size); at += memory.PageSize {
					if err := m.mem.WriteAt([]byte(fmt.Sprintf("page %d", at)), at); err != nil {
						b.Fatal(err)
					}
				}
				if err := m.Start(b.Context()); err != nil {
					b.Fatal(err)
				}
				var pause, took time.Duration
				n := 0
				for b.Loop() {
					path := filepath.Join(b.TempDir(), "snap")
					host, err := savehost.NewLocal(path, savehost.Options{})
					if err != nil {
						b.Fatal(err)
					}
					r, err := m.Save(b.Context(), host, SaveOptions{})
					if err != nil {
						b.Fatal(err)
					}
					pause, took, n = pause+r.Pause, took+r.Took, n+1
					if err := os.RemoveAll(path); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(pause.Microseconds())/1000/float64(n), "ms-pause")
				b.ReportMetric(float64(took.Milliseconds())/float64(n), "ms-save")
			})
		}
	}
}
