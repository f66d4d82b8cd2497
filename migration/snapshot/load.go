package snapshot

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"

	"ditto.vm/internal/parallel"
	"ditto.vm/memory"
)

// LoadOptions say how to load.
type LoadOptions struct {
	// Workers bounds the cores in use; zero means all.
	Workers int
	// Progress hears how many bytes of memory are done, if not nil. It is
	// called by one goroutine at a time and must not block.
	Progress func(done, total uint64)
}

// unitPages is what a worker loads at a time: 1 MiB.
const unitPages = 256

// Load fills guest memory, which nobody touched since it was made or cleared.
// All bytes are checked; pages of zeros are left unpopulated. After an error
// memory holds anything.
func (s *Snapshot) Load(ctx context.Context, space *memory.Space, o LoadOptions) error {
	if err := s.load(ctx, space, o); err != nil {
		return fmt.Errorf("load snapshot %s: %w", s.dir, err)
	}
	return nil
}

func (s *Snapshot) load(ctx context.Context, space *memory.Space, o LoadOptions) error {
	if err := s.fits(space); err != nil {
		return err
	}
	if o.Workers <= 0 {
		o.Workers = runtime.NumCPU()
	}
	stored, equal, total := s.units()
	l := &loading{s: s, space: space, o: o, total: total, readers: make([]*Reader, o.Workers)}
	defer l.close()
	err := parallel.Do(ctx, o.Workers, len(stored), func(_ context.Context, w, i int) error {
		return l.unit(w, stored[i], l.read)
	})
	if err != nil {
		return err
	}
	// What these equal is there now.
	return parallel.Do(ctx, o.Workers, len(equal), func(_ context.Context, w, i int) error {
		return l.unit(w, equal[i], l.copy)
	})
}

// fits reports why the snapshot is not of such a memory.
func (s *Snapshot) fits(space *memory.Space) error {
	var ranges []memory.Range
	for _, r := range space.Regions() {
		ranges = append(ranges, r.Range)
	}
	if !slices.Equal(ranges, s.m.regions()) {
		return fmt.Errorf("it is of a memory of %d bytes, not of %d", s.m.Memory.Size, space.Size())
	}
	return nil
}

// units cuts what is not zero into rows of about unitPages: what must be read,
// and what equals other pages of this snapshot. It returns their bytes too.
func (s *Snapshot) units() (stored, equal [][]flatRun, bytes uint64) {
	var rows [2]struct {
		all   [][]flatRun
		row   []flatRun
		pages uint64
	}
	add := func(to int, f flatRun) {
		r := &rows[to]
		r.row = append(r.row, f)
		if r.pages += f.Pages; r.pages >= unitPages {
			r.all, r.row, r.pages = append(r.all, r.row), nil, 0
		}
	}
	for i := range s.runs() {
		f := s.run(i)
		if f.Kind == Zero {
			continue
		}
		bytes += f.Pages * memory.PageSize
		to := 0
		if f.Kind == Page && f.src == s {
			to = 1
		}
		for rest := f; ; {
			// Whole frames stay whole.
			end := rest.Start + memory.GFN(unitPages-rest.Number%unitPages)
			if rest.Kind == Block || end >= rest.End() {
				add(to, rest)
				break
			}
			part := rest
			part.Run = rest.cut(rest.Start, end)
			add(to, part)
			rest.Run = rest.cut(end, rest.End())
		}
	}
	for i := range rows {
		if len(rows[i].row) > 0 {
			rows[i].all = append(rows[i].all, rows[i].row)
		}
	}
	return rows[0].all, rows[1].all, bytes
}

// loading is one run of Load.
type loading struct {
	s       *Snapshot
	space   *memory.Space
	o       LoadOptions
	total   uint64
	readers []*Reader // one a worker

	mu   sync.Mutex // guards done
	done uint64
}

func (l *loading) close() {
	for _, r := range l.readers {
		if r != nil {
			r.Close()
		}
	}
}

// unit fills the pages of a row.
func (l *loading) unit(worker int, row []flatRun, fill func(worker int, f flatRun, dst []byte) error) error {
	bytes := uint64(0)
	for _, f := range row {
		r := f.Range()
		dst, err := l.space.Writable(r.Start, r.Size)
		if err != nil {
			return err
		}
		err = fill(worker, f, dst)
		l.space.Wrote(r.Start, r.Size)
		if err != nil {
			return err
		}
		bytes += r.Size
	}
	if l.o.Progress != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.done += bytes
		l.o.Progress(l.done, l.total)
	}
	return nil
}

func (l *loading) read(worker int, f flatRun, dst []byte) error {
	if l.readers[worker] == nil {
		l.readers[worker] = l.s.NewReader()
	}
	return l.readers[worker].read(f, dst)
}

// copy fills dst from the memory of the pages that it equals.
func (l *loading) copy(_ int, f flatRun, dst []byte) error {
	src, err := l.space.View(memory.GFN(f.Number).GPA(), uint64(len(dst)))
	copy(dst, src)
	return err
}
