package disktest

import (
	"bytes"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio/blk"
	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/images/disk"
)

// dirty counts the pages of a file that a power cut would lose.
func dirty(t *testing.T, path string) uint64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		t.Fatal(err)
	}
	if fs.Type == unix.TMPFS_MAGIC {
		t.Skip("nothing is ever stable on tmpfs: set TMPDIR to a disk")
	}
	var stat unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &stat, 0); err != nil {
		t.Skipf("cachestat: %v: needs Linux 6.5", err)
	}
	return stat.Dirty + stat.Writeback
}

// TestStable checks what the guest may rely on after a power cut: what it
// flushed in write-back mode, and everything that completed while its disk has
// no write cache. Without ditto's fdatasync or RWF_DSYNC it fails.
func TestStable(t *testing.T) {
	data := bytes.Repeat([]byte{7}, 64<<10)
	for _, c := range []struct {
		cache    disk.Cache
		features uint64
		flush    bool
	}{
		{disk.CacheWriteback, allFeatures, true},
		{disk.CacheNone, allFeatures, true},
		{disk.CacheWritethrough, allFeatures, false},
		{disk.CacheWriteback, allFeatures &^ blk.FeatureFlush, false},
	} {
		t.Run(fmt.Sprintf("%s flush=%v", c.cache, c.flush), func(t *testing.T) {
			device, path := newDisk(t, 1<<20, disk.Options{Cache: c.cache}, 1)
			d := virtiotest.NewDriver(t, device)
			d.Start(c.features, 64)
			q := d.Queue(0)
			for i := range 10 {
				request(t, q, header(typeOut, uint64(i*128)), data)
				if c.flush {
					request(t, q, header(typeFlush, 0), nil)
				}
				if n := dirty(t, path); n != 0 {
					t.Fatalf("round %d: a power cut would lose %d pages", i, n)
				}
			}
		})
	}
}

// request makes a request that has to succeed.
func request(t *testing.T, q *virtiotest.Queue, head, data []byte) {
	t.Helper()
	out := [][]byte{head}
	if data != nil {
		out = append(out, data)
	}
	at := q.Submit(out, 1)
	q.Kick()
	q.Wait(at)
	if status := q.Writable(at)[0]; status != 0 {
		t.Fatalf("status %d", status)
	}
}
