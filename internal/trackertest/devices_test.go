package trackertest_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio/balloon"
	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/memory"
)

// devices is what of a VMM writes to guest memory: it copies, it reads files past
// the page cache, and it gives pages to a balloon.
type devices struct {
	t      *testing.T
	space  *memory.Space
	where  memory.Range // what the devices write
	direct int          // a file opened with O_DIRECT

	inflate *virtiotest.Queue
	pfns    memory.GPA // the balloon's request
}

// balloonFeature is VIRTIO_F_VERSION_1 alone: no statistics, no reports.
const balloonFeature = 1 << 32

func newDevices(t *testing.T, m *machine, where memory.Range) *devices {
	dev, err := balloon.New(balloon.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
	})
	d := virtiotest.NewMachineOn(t, m.Memory).NewDriver(t, dev)
	d.Start(balloonFeature, 16)
	return &devices{
		t: t, space: m.Memory, where: where, direct: directFile(t),
		inflate: d.Queue(0), pfns: d.Alloc(page, page),
	}
}

// work writes until it is told to stop.
func (d *devices) work(stop <-chan struct{}) {
	rng := rand.New(rand.NewPCG(9, 9))
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		default:
		}
		gpa := d.where.Start + memory.GPA(rng.Uint64N(d.where.Size/page))*page
		var err error
		switch i % 3 {
		case 0:
			err = d.space.WriteAt([]byte(fmt.Sprint(i)), gpa+memory.GPA(rng.IntN(page-20)))
		case 1:
			err = d.take(gpa, 1+rng.IntN(16))
		case 2:
			err = d.readDirect(gpa, int64(rng.IntN(16))*page)
		}
		if err != nil {
			d.t.Error(err)
			return
		}
	}
}

// shakeEvery is often enough to meet every kind of call, and leaves a small
// machine time for the rest.
const shakeEvery = 200 * time.Microsecond

// shake sends signals to every thread of the process until it is told to stop.
// They are those with which the Go scheduler interrupts goroutines, and it ignores
// those that it did not send.
func shake(t *testing.T, stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Error(err)
			return
		}
		for _, thread := range threads {
			if tid, err := strconv.Atoi(thread.Name()); err == nil {
				_ = unix.Tgkill(unix.Getpid(), tid, unix.SIGURG)
			}
		}
		time.Sleep(shakeEvery)
	}
}

// take gives up to n pages from gpa on to the balloon.
func (d *devices) take(gpa memory.GPA, n int) error {
	var pfns []byte
	for ; n > 0 && d.where.Contains(gpa, page); n-- {
		pfns = binary.LittleEndian.AppendUint32(pfns, uint32(gpa/page))
		gpa += page
	}
	if err := d.space.WriteAt(pfns, d.pfns); err != nil {
		return err
	}
	head := d.inflate.Add(false, virtiotest.Segment{GPA: d.pfns, Len: len(pfns)})
	d.inflate.Kick()
	d.inflate.Wait(head)
	return nil
}

// readDirect reads a page of a file into guest memory as virtio-blk does.
func (d *devices) readDirect(gpa memory.GPA, off int64) error {
	buf, err := d.space.Writable(gpa, page)
	if err != nil {
		return err
	}
	if n, err := unix.Pread(d.direct, buf, off); err != nil || n != page {
		return fmt.Errorf("read %d bytes with O_DIRECT: %w", n, err)
	}
	d.space.Wrote(gpa, page)
	return nil
}

// directFile opens a file of 16 random pages with O_DIRECT.
func directFile(t testing.TB) int {
	t.Helper()
	path := filepath.Join(t.TempDir(), "direct")
	content := make([]byte, 16*page)
	_, _ = rand.NewChaCha8([32]byte{3}).Read(content)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("open with O_DIRECT: %v; try: TMPDIR on a disk file system", err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}
