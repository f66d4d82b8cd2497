package boot

import (
	"errors"
	"fmt"
	"io"

	"ditto.vm/memory"
)

// loader carries what the two protocols share while a kernel is loaded.
type loader struct {
	mem    *memory.Space
	config Config
	e820   []E820Entry
	loaded Loaded
}

// readRange reads size bytes at offset of image straight into guest memory at
// gpa, and notes the range. The caller has checked that it lies in RAM.
func (l *loader) readRange(source Source, image *Image, offset int64, gpa memory.GPA, size uint64) error {
	if size == 0 {
		return nil
	}
	dst, err := l.mem.Writable(gpa, size)
	if err != nil {
		return fmt.Errorf("%s %s: %w", source, image.Name, err)
	}
	if err := image.readAt(dst, offset); err != nil {
		return fmt.Errorf("%s %w", source, err)
	}
	l.mem.Wrote(gpa, size)
	l.loaded.Segments = append(l.loaded.Segments, FileRange{Source: source, GPA: gpa, Offset: offset, Size: size})
	return nil
}

// zeroRange clears guest memory.
func (l *loader) zeroRange(gpa memory.GPA, size uint64) error {
	dst, err := l.mem.Writable(gpa, size)
	if err != nil {
		return err
	}
	clear(dst)
	l.mem.Wrote(gpa, size)
	return nil
}

// readAt fills p from the file at offset.
func (i *Image) readAt(p []byte, offset int64) error {
	n, err := i.Reader.ReadAt(p, offset)
	switch {
	case n == len(p):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return fmt.Errorf("%s: ends at byte %d: %w", i.Name, offset+int64(n), ErrTruncated)
	}
	return fmt.Errorf("%s: read at %d: %w", i.Name, offset, err)
}

// usable reports whether [start, start+size) is one piece of usable RAM.
func (l *loader) usable(start memory.GPA, size uint64) bool {
	for _, e := range l.e820 {
		if e.Type == E820RAM && e.Contains(start, size) {
			return true
		}
	}
	return false
}

// requireUsable fails with [ErrNoRoom] when the kernel's range is not usable
// RAM.
func (l *loader) requireUsable(start memory.GPA, size uint64) error {
	if l.usable(start, size) {
		return nil
	}
	end := start + memory.GPA(size)
	if end <= lowTop(l.mem) || end < start || end > memory.HoleStart {
		return fmt.Errorf("kernel %s: needs [%s, +%#x), which is not usable RAM: %w", l.config.Kernel.Name, start, size, ErrNoRoom)
	}
	return fmt.Errorf("kernel %s: needs RAM up to %s, the guest has %d MiB; give it at least %d MiB: %w",
		l.config.Kernel.Name, end, l.mem.Size()>>20, mebibytes(uint64(end)), ErrNoRoom)
}

// placeInitrd reads the initrd as high as it may go: page-aligned, in usable
// RAM below 3 GiB, its last byte at or below highest, above floor, where the
// kernel ends. It returns an empty range when there is none.
func (l *loader) placeInitrd(floor, highest memory.GPA) (memory.Range, error) {
	initrd := l.config.Initrd
	if initrd == nil {
		return memory.Range{}, nil
	}
	if initrd.Size <= 0 {
		return memory.Range{}, fmt.Errorf("initrd %s: file is empty: %w", initrd.Name, ErrTruncated)
	}
	size := uint64(initrd.Size)
	floor = (floor + memory.PageSize - 1) &^ (memory.PageSize - 1)
	start, ok := l.highestFit(floor, highest, size)
	if !ok {
		need := uint64(floor) + size + memory.PageSize
		if size > uint64(memory.HoleStart) || need > min(uint64(highest)+1, uint64(memory.HoleStart)) {
			return memory.Range{}, fmt.Errorf("initrd %s: %d MiB do not fit between the kernel and %s, where this kernel looks for it: %w",
				initrd.Name, mebibytes(size), min(highest, memory.HoleStart-1), ErrNoRoom)
		}
		return memory.Range{}, fmt.Errorf("initrd %s: %d MiB do not fit above the kernel's %d MiB into %d MiB of memory; give the guest at least %d MiB: %w",
			initrd.Name, mebibytes(size), mebibytes(uint64(floor)), l.mem.Size()>>20, mebibytes(need), ErrNoRoom)
	}
	if err := l.readRange(SourceInitrd, initrd, 0, start, size); err != nil {
		return memory.Range{}, err
	}
	return memory.Range{Start: start, Size: size}, nil
}

// highestFit returns the highest page-aligned start of size bytes of usable RAM
// in [floor, highest], below the 32-bit hole.
func (l *loader) highestFit(floor, highest memory.GPA, size uint64) (memory.GPA, bool) {
	for i := len(l.e820) - 1; i >= 0; i-- {
		e := l.e820[i]
		if e.Type != E820RAM || e.Start >= memory.HoleStart {
			continue
		}
		end := min(e.End(), memory.HoleStart)
		if highest < end-1 {
			end = highest + 1
		}
		if uint64(end) < size {
			continue
		}
		start := (end - memory.GPA(size)) &^ (memory.PageSize - 1)
		if start >= max(e.Start, floor) {
			return start, true
		}
	}
	return 0, false
}

// lowTop returns the end of RAM below the 32-bit hole.
func lowTop(mem *memory.Space) memory.GPA { return mem.Regions()[0].End() }

// mebibytes rounds bytes up to MiB.
func mebibytes(bytes uint64) uint64 { return (bytes-1)>>20 + 1 }
