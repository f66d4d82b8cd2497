package vmm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/memory"
	"ditto.vm/vmm/api"
)

// ioHeader is where the header and the status of requests of the first disk lie;
// those of the next ones follow, each 1 MiB further. The rings lie 512 KiB before.
const ioHeader memory.GPA = 2<<20 + 512<<10

// attachPolled plays the driver of a disk without interrupts, so that waiting
// for it writes no memory.
func attachPolled(t *testing.T, m *VM, disk int) *virtiotest.Driver {
	t.Helper()
	machine := &virtiotest.Machine{Memory: m.mem, Ports: &m.ports, MMIO: &m.mmio, Log: m.log}
	driver := machine.Attach(t, m.pci.devices[disk].PCIDevice, 1+disk)
	driver.Reset()
	driver.Negotiate(^uint64(0) &^ (virtio.FeatureEventIdx | virtio.FeatureIndirectDesc))
	driver.SetupQueues(16)
	driver.SetStatus(virtio.StatusDriverOK)
	return driver
}

// io makes one request of the first disk and waits for it.
func (r *saveRig) io(kind uint32, offset int64, buffer memory.Range) error {
	r.t.Helper()
	return r.ioOf(0, kind, offset, buffer)
}

// ioOf makes one request of a disk and waits for it. Like a guest it touches
// memory only while the VM runs.
func (r *saveRig) ioOf(disk int, kind uint32, offset int64, buffer memory.Range) error {
	r.t.Helper()
	q := r.drivers[disk].Queue(0)
	head := ioHeader + memory.GPA(disk)<<20
	status := head + 64
	header := binary.LittleEndian.AppendUint32(nil, kind)
	header = binary.LittleEndian.AppendUint64(append(header, 0, 0, 0, 0), uint64(offset/512))
	id := uint16(0)
	for ran := false; !ran; {
		r.m.mu.Lock()
		if r.m.state == api.Stopped {
			r.m.mu.Unlock()
			return errEnded
		}
		if ran = r.m.state == api.Running; ran {
			if err := r.m.mem.WriteAt(header, head); err != nil {
				r.t.Fatal(err)
			}
			id = q.Add(false, virtiotest.Segment{GPA: head, Len: 16},
				virtiotest.Segment{GPA: buffer.Start, Len: int(buffer.Size), Write: kind == 0},
				virtiotest.Segment{GPA: status, Len: 1, Write: true})
			q.Kick()
			// Trackers over KVM's logs do not see what a test writes.
			desc, _, used := q.Rings()
			r.m.mem.Wrote(desc, uint64(used-desc)+4096)
		}
		r.m.mu.Unlock()
		if !ran {
			time.Sleep(time.Millisecond)
		}
	}
	for end := time.Now().Add(virtiotest.Patience); !q.Done(id); {
		select {
		case <-r.m.ended:
			return errEnded
		default:
		}
		if q.Reap() == 0 {
			time.Sleep(20 * time.Microsecond)
		}
		if time.Now().After(end) {
			return errors.New("the disk does not answer")
		}
	}
	if got, err := r.m.mem.View(status, 1); err != nil || got[0] != 0 {
		return fmt.Errorf("request %d of %d bytes at %d: status %v, %w", kind, buffer.Size, offset, got, err)
	}
	return nil
}

// read and write move n blocks between the disk and the buffers' page.
func (r *saveRig) read(block, page, n int) {
	r.t.Helper()
	if err := r.io(0, int64(block)*memory.PageSize, r.buffer(page, n)); err != nil && !errors.Is(err, errEnded) {
		r.t.Error(err)
	}
}

func (r *saveRig) write(block, page, n int) {
	r.t.Helper()
	b := r.buffer(page, n)
	if err := r.io(1, int64(block)*memory.PageSize, b); err != nil {
		if !errors.Is(err, errEnded) {
			r.t.Error(err)
		}
		return
	}
	src, err := r.m.mem.View(b.Start, b.Size)
	if err != nil {
		r.t.Fatal(err)
	}
	copy(r.content[block*memory.PageSize:], src)
}

func (r *saveRig) buffer(page, n int) memory.Range {
	return memory.Range{Start: namesBuffers + memory.GPA(page)*memory.PageSize, Size: uint64(n) * memory.PageSize}
}

// store changes a page of the buffers as a vCPU does.
func (r *saveRig) store(page int, value byte) {
	r.t.Helper()
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	b, err := r.m.mem.Writable(namesBuffers+memory.GPA(page)*memory.PageSize, memory.PageSize)
	if err != nil {
		r.t.Fatal(err)
	}
	if r.m.state == api.Running {
		b[100] = value
		r.m.mem.Wrote(namesBuffers+memory.GPA(page)*memory.PageSize, 1)
	}
}

// readAll brings all of the disk into the buffers.
func (r *saveRig) readAll() {
	r.t.Helper()
	const piece = 64
	for at := 0; at < namesDisk/memory.PageSize; at += piece {
		r.read(at, at, piece)
	}
}

// traffic reads and writes the disk and stores into the buffers at random, until
// stop is called.
func (r *saveRig) traffic(seed uint64) (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		rng := rand.New(rand.NewPCG(seed, 2))
		const pages = namesDisk / memory.PageSize
		for {
			select {
			case <-done:
				return
			default:
			}
			n := 1 + rng.IntN(8)
			block, page := rng.IntN(pages-n), rng.IntN(pages-n)
			switch rng.IntN(4) {
			case 0:
				r.write(block, page, n)
			case 1:
				r.store(page, byte(rng.Uint32()))
			default:
				r.read(block, page, n)
			}
			r.overwritten.Add(int64(n))
		}
	})
	stop = sync.OnceFunc(func() {
		close(done)
		wg.Wait()
	})
	r.t.Cleanup(stop)
	return stop
}

// equalPages makes pages 5000 to 5003 of the buffers equal.
func (r *saveRig) equalPages() {
	r.t.Helper()
	b := bytes.Repeat([]byte("same"), memory.PageSize)
	if err := r.m.mem.WriteAt(b, r.buffer(5000, 4).Start); err != nil {
		r.t.Fatal(err)
	}
}
