package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"ditto.vm/memory"
	"ditto.vm/vmm/kvm"
)

// guestMemory makes guest memory with a tracker and the book of its frames, as a
// machine does before it drops its rights.
func guestMemory(kind memory.TrackerKind) (*memory.Space, memory.Tracker, *memory.Frames, error) {
	space, err := memory.New(memory.Config{Size: 8 << 20})
	if err != nil {
		return nil, nil, nil, err
	}
	var host memory.TrackerHost
	if kind == memory.TrackerKVMLog {
		system, err := kvm.Open()
		if err != nil {
			return nil, nil, nil, err
		}
		vm, err := system.CreateVM()
		if err != nil {
			return nil, nil, nil, err
		}
		for _, r := range space.Regions() {
			slot := kvm.Memslot{Slot: r.Slot, GPA: uint64(r.Start), Size: r.Size, HVA: uint64(r.HVA)}
			if err := vm.SetMemslot(slot); err != nil {
				return nil, nil, nil, err
			}
		}
		host.Log = vm
	}
	tracker, _, err := memory.OpenTracker(space, kind, host)
	if err != nil {
		return nil, nil, nil, err
	}
	frames, err := memory.NewFrames(space, tracker)
	return space, tracker, frames, err
}

// trackWrites arms, collects and disarms.
func trackWrites(kind memory.TrackerKind) func(string) (func() error, error) {
	return func(string) (func() error, error) {
		space, tracker, _, err := guestMemory(kind)
		return func() error {
			all := space.Regions()[0].Range
			if err := space.WriteAt([]byte{1}, 0); err != nil {
				return err
			}
			if err := tracker.Arm(all); err != nil {
				return err
			}
			if err := space.WriteAt([]byte{2}, 0); err != nil {
				return err
			}
			set := space.NewPageSet()
			if err := tracker.Collect(all, set, memory.Rearm); err != nil {
				return err
			}
			if !set.Has(0) {
				return errors.New("the write was not found")
			}
			return errors.Join(tracker.Disarm(all), tracker.Remapped(all))
		}, err
	}
}

// collapseFrame breaks a frame and makes it large again.
func collapseFrame(string) (func() error, error) {
	space, _, frames, err := guestMemory(memory.TrackerNone)
	return func() error {
		if err := space.WriteAt(bytes.Repeat([]byte{1}, memory.LargeFrameSize), 0); err != nil {
			return err
		}
		if err := frames.Break(0, 0); err != nil {
			return err
		}
		if err := frames.Collapse(0, 512); err != nil {
			return err
		}
		if state, _, _ := frames.At(0); state != memory.FrameLarge {
			return fmt.Errorf("the frame is %s", state)
		}
		_, err := space.HostUsage()
		return err
	}, err
}

// readMapped compares a page with an index that is mapped.
func readMapped(dir string) (func() error, error) {
	f, err := os.Open(filepath.Join(dir, "disk"))
	if err != nil {
		return nil, err
	}
	index, err := unix.Mmap(int(f.Fd()), 0, 8192, unix.PROT_READ, unix.MAP_SHARED)
	return func() error {
		if index[0] != 'x' {
			return errors.New("the mapping reads other bytes")
		}
		return unix.Madvise(index, unix.MADV_RANDOM)
	}, err
}

// discardPages gives memory back, as the balloon does.
func discardPages(string) (func() error, error) {
	space, _, _, err := guestMemory(memory.TrackerNone)
	return func() error {
		return errors.Join(space.WriteAt([]byte{1}, 0), space.Discard(0, memory.LargeFrameSize), space.Clear())
	}, err
}

// bytesSource has pages of bytes.
type bytesSource struct{}

func (bytesSource) ReadPages(_ memory.GFN, dst []byte) error {
	for i := range dst {
		dst[i] = 'x'
	}
	return nil
}

func (bytesSource) Row(gfn memory.GFN) memory.Range {
	return memory.Range{Start: gfn.GPA(), Size: memory.PageSize}
}

// restoredMemory is memory that comes back when the kernel touches it, and is
// given back and emptied.
func restoredMemory(dir string) (func() error, error) {
	const page, frame = memory.PageSize, memory.LargeFrameSize
	space, _, _, err := guestMemory(memory.TrackerWPAsync)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(filepath.Join(dir, "disk"))
	if err != nil {
		return nil, err
	}
	if err := space.MapFiles(memory.FileRange{Range: memory.Range{Start: 0, Size: page}, File: f}); err != nil {
		return nil, err
	}
	waiting := space.NewPageSet()
	waiting.Add(frame, 2*frame)
	missing, err := space.OpenMissing(bytesSource{}, waiting, memory.MissingOptions{})
	return func() error {
		at := uintptr(space.Regions()[0].HVA) + frame
		local := make([]byte, page)
		if _, err := unix.ProcessVMReadv(os.Getpid(), []unix.Iovec{{Base: &local[0], Len: page}}, []unix.RemoteIovec{{Base: at, Len: page}}, 0); err != nil {
			return err
		}
		if local[0] != 'x' {
			return errors.New("the page has other bytes")
		}
		if err := missing.Run(context.Background(), 0); err != nil {
			return err
		}
		return errors.Join(space.Prefault(memory.Range{Start: 0, Size: frame}), space.Discard(0, page), space.Discard(frame+page, page), space.Clear(), missing.Close())
	}, err
}

// readDisk reads blocks past the page cache through another descriptor.
func readDisk(dir string) (func() error, error) {
	fd, err := unix.Open(filepath.Join(dir, "disk"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	return func() error {
		block := make([]byte, 4096)
		if _, err := unix.Pread(fd, block, 4096); err != nil {
			return err
		}
		var st unix.Stat_t
		return unix.Fstat(fd, &st)
	}, err
}
