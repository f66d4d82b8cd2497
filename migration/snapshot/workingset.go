package snapshot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"

	"ditto.vm/memory"
)

// ErrNoWorkingSet says that nobody has recorded yet what a restored guest touches
// first.
var ErrNoWorkingSet = errors.New("no working set is recorded")

// The file workingset: what a restored guest touched first, so that the next one
// finds it in memory. Offsets are in bytes, numbers little-endian.
const (
	offSetMagic      = 0  // 8 bytes
	offSetVersion    = 8  // u32
	offSetHeaderSize = 12 // u32
	offSetSnapshot   = 16 // 16 bytes: identity of the snapshot
	offSetRuns       = 32 // u64
	offSetPages      = 40 // u64: of all runs
	offSetBodySum    = 48 // XXH3-64 of the runs
	offSetHeaderSum  = 56 // XXH3-64 of the bytes before it

	setHeaderSize = 64
	setMagic      = "DITTOWKS"
	setVersion    = 1
	setRunSize    = 8

	// maxSetRuns bounds the file to 512 KiB.
	maxSetRuns = 1 << 16
)

// WriteWorkingSet writes to a file of [CreateWorkingSet] which pages a guest
// touched that was restored from the snapshot. Of very scattered pages some are
// added, so that the file keeps within its bounds.
func (s *Snapshot) WriteWorkingSet(f *os.File, pages *memory.PageSet) error {
	b := encodeWorkingSet(s.id, setRuns(pages))
	err := f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt(b, 0)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return writeError(fmt.Errorf("working set of %s: %w", s.dir, err))
	}
	return nil
}

// setRuns returns the runs of a set, joined over ever larger gaps until they are
// few enough.
func setRuns(pages *memory.PageSet) []memory.Range {
	for gap := uint64(0); ; gap = 2*gap + memory.PageSize {
		var runs []memory.Range
		for r := range pages.Runs() {
			if n := len(runs); n > 0 && joins(runs[n-1], r, gap) {
				runs[n-1].Size = uint64(r.End() - runs[n-1].Start)
				continue
			}
			runs = append(runs, r)
		}
		if len(runs) <= maxSetRuns {
			return runs
		}
	}
}

// joins reports whether b follows a at so short a distance, in the same region.
func joins(a, b memory.Range, gap uint64) bool {
	across := a.Start < memory.HoleStart && b.Start >= memory.HoleEnd
	return !across && uint64(b.Start-a.End()) <= gap
}

func encodeWorkingSet(id ID, runs []memory.Range) []byte {
	le := binary.LittleEndian
	b := make([]byte, setHeaderSize, setHeaderSize+len(runs)*setRunSize)
	pages := uint64(0)
	for _, r := range runs {
		b = le.AppendUint32(b, uint32(r.Start.GFN()))
		b = le.AppendUint32(b, uint32(r.Size/memory.PageSize))
		pages += r.Size / memory.PageSize
	}
	copy(b[offSetMagic:], setMagic)
	le.PutUint32(b[offSetVersion:], setVersion)
	le.PutUint32(b[offSetHeaderSize:], setHeaderSize)
	copy(b[offSetSnapshot:], id[:])
	le.PutUint64(b[offSetRuns:], uint64(len(runs)))
	le.PutUint64(b[offSetPages:], pages)
	le.PutUint64(b[offSetBodySum:], xxh3.Hash(b[setHeaderSize:]))
	le.PutUint64(b[offSetHeaderSum:], xxh3.Hash(b[:offSetHeaderSum]))
	return b
}

// ReadWorkingSet returns the pages that a guest restored from the snapshot
// touched first, in ascending order. The error wraps [ErrNoWorkingSet] where none
// is recorded.
func (s *Snapshot) ReadWorkingSet() ([]memory.Range, error) {
	runs, err := s.readWorkingSet()
	if err != nil {
		return nil, fmt.Errorf("working set of %s: %w", s.dir, err)
	}
	return runs, nil
}

func (s *Snapshot) readWorkingSet() ([]memory.Range, error) {
	f, size, err := s.openFile(WorkingSet)
	if errors.Is(err, fs.ErrNotExist) || err == nil && size == 0 {
		err = ErrNoWorkingSet
	}
	if err != nil {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
		return nil, err
	}
	defer f.Close()
	if size > setHeaderSize+maxSetRuns*setRunSize {
		return nil, formatError("it has %d bytes", size)
	}
	b := make([]byte, size)
	if err := readFull(f, b, 0); err != nil {
		return nil, err
	}
	return decodeWorkingSet(b, s.id, s.m.regions())
}

// decodeWorkingSet checks everything that a working set says.
func decodeWorkingSet(b []byte, id ID, regions []memory.Range) ([]memory.Range, error) {
	le := binary.LittleEndian
	switch {
	case len(b) < setHeaderSize || string(b[:len(setMagic)]) != setMagic:
		return nil, formatError("it does not begin with %s", setMagic)
	case le.Uint32(b[offSetVersion:]) > setVersion:
		return nil, fmt.Errorf("%w: working set of format %d, this program reads up to %d", ErrVersion, le.Uint32(b[offSetVersion:]), setVersion)
	case le.Uint64(b[offSetHeaderSum:]) != xxh3.Hash(b[:offSetHeaderSum]):
		return nil, formatError("the header was altered")
	case le.Uint32(b[offSetVersion:]) != setVersion || le.Uint32(b[offSetHeaderSize:]) != setHeaderSize:
		return nil, formatError("header %x", b[:setHeaderSize])
	case ID(b[offSetSnapshot:]) != id:
		return nil, formatError("it is of the snapshot %s", ID(b[offSetSnapshot:]))
	}
	body := b[setHeaderSize:]
	if le.Uint64(b[offSetRuns:]) != uint64(len(body))/setRunSize || len(body)%setRunSize != 0 || len(body) > maxSetRuns*setRunSize {
		return nil, formatError("%d runs in %d bytes", le.Uint64(b[offSetRuns:]), len(body))
	}
	if le.Uint64(b[offSetBodySum:]) != xxh3.Hash(body) {
		return nil, formatError("its runs were altered")
	}
	runs := make([]memory.Range, 0, len(body)/setRunSize)
	pages, end := uint64(0), memory.GPA(0)
	for ; len(body) > 0; body = body[setRunSize:] {
		r := memory.Range{Start: memory.GFN(le.Uint32(body)).GPA(), Size: uint64(le.Uint32(body[4:])) * memory.PageSize}
		if r.Size == 0 || r.Start < end || !inRegions(r, regions) {
			return nil, formatError("run %d: %d pages from %s on", len(runs), r.Size/memory.PageSize, r.Start.GFN())
		}
		runs = append(runs, r)
		pages, end = pages+r.Size/memory.PageSize, r.End()
	}
	if pages != le.Uint64(b[offSetPages:]) {
		return nil, formatError("%d pages, not %d", pages, le.Uint64(b[offSetPages:]))
	}
	return runs, nil
}

func inRegions(r memory.Range, regions []memory.Range) bool {
	for _, region := range regions {
		if region.Contains(r.Start, r.Size) {
			return true
		}
	}
	return false
}

// CreateWorkingSet opens the file for the working set of the snapshot in dir, to
// be recorded by who restores it first. It returns nil when there is one, or when
// another is recording it: a lock on the file lasts until it is closed.
func CreateWorkingSet(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, WorkingSet), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, writeError(fmt.Errorf("working set: %w", err))
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	info, statErr := f.Stat()
	switch {
	case errors.Is(err, unix.EWOULDBLOCK) || err == nil && statErr == nil && info.Size() > 0:
		return nil, f.Close()
	case err != nil || statErr != nil:
		return nil, errors.Join(fmt.Errorf("working set of %s: %w", dir, errors.Join(err, statErr)), f.Close())
	}
	return f, nil
}
