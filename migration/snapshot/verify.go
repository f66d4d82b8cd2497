package snapshot

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"ditto.vm/images/layer"
	"ditto.vm/internal/parallel"
	"ditto.vm/memory"
)

// maxProblems bounds what Verify lists of one snapshot.
const maxProblems = 16

// Verify reads everything: the bytes of all pages, and all blocks that pages are
// named by, of the snapshot and its ancestors. It returns nil when all is what
// it was, and else the first problems, joined.
func (s *Snapshot) Verify(ctx context.Context, o LoadOptions) error {
	if o.Workers <= 0 {
		o.Workers = runtime.NumCPU()
	}
	var errs []error
	v := &verifying{o: o}
	for a := s; a != nil; a = a.parent {
		v.total += a.p.pagesSize + a.m.Holds.Blocks
	}
	for a := s; a != nil; a = a.parent {
		v.s, v.problems = a, nil
		if err := v.run(ctx); err != nil {
			return errors.Join(append(errs, err)...)
		}
		for _, err := range v.problems {
			errs = append(errs, fmt.Errorf("verify: %w", err))
		}
	}
	return errors.Join(errs...)
}

// verifying is one run of Verify.
type verifying struct {
	s     *Snapshot
	o     LoadOptions
	total uint64

	mu       sync.Mutex // guards the following
	done     uint64
	problems []error
}

// note counts what was read, and keeps a problem. It returns an error when
// there are enough.
func (v *verifying) note(bytes uint64, err error) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.done += bytes
	if v.o.Progress != nil {
		v.o.Progress(v.done, v.total)
	}
	if err == nil {
		return nil
	}
	v.problems = append(v.problems, err)
	if len(v.problems) >= maxProblems {
		return errEnough
	}
	return nil
}

var errEnough = errors.New("and maybe more")

func (v *verifying) run(ctx context.Context) error {
	if err := v.s.checkDigests(); err != nil {
		// Without them nothing can be checked.
		v.problems = append(v.problems, err)
		return nil
	}
	err := v.pages(ctx)
	if err == nil {
		err = v.blocks(ctx)
	}
	if errors.Is(err, errEnough) {
		v.problems, err = append(v.problems, err), nil
	}
	return err
}

// checkDigests reads all digests of the page map.
func (s *Snapshot) checkDigests() error {
	all, err := s.p.all()
	if err == nil && digestOfAll(all) != s.m.Pages.Digest {
		err = formatError("manifest and page map do not agree on pages")
	}
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", s.dir, err)
	}
	return nil
}

// pages reads all of the file pages.
func (v *verifying) pages(ctx context.Context) error {
	s := v.s
	for at, size := range s.p.gaps() {
		if err := s.checkZeros(ctx, at, size); err != nil {
			if ctx.Err() != nil {
				return err
			}
			if err := v.note(0, err); err != nil {
				return err
			}
		}
	}
	var units []Run
	each := uint64(unitPages)
	if s.p.compressed() {
		each = uint64(s.p.framePages)
	}
	for slot := uint64(0); slot < s.p.slots; slot += each {
		units = append(units, Run{Kind: Unique, Number: slot, Pages: min(each, s.p.slots-slot)})
	}
	readers := make([]*Reader, v.o.Workers)
	buffers := make([][]byte, v.o.Workers)
	defer func() {
		for _, r := range readers {
			if r != nil {
				r.Close()
			}
		}
	}()
	return parallel.Do(ctx, v.o.Workers, len(units), func(_ context.Context, w, i int) error {
		if readers[w] == nil {
			readers[w], buffers[w] = s.NewReader(), make([]byte, min(each, s.p.slots)*memory.PageSize)
		}
		bytes := units[i].Pages * memory.PageSize
		if s.p.compressed() {
			bytes = uint64(s.p.frames[i].size)
		}
		return v.note(bytes, readers[w].checkSlots(units[i], buffers[w]))
	})
}

// checkSlots reads slots of pages and checks those in use.
func (r *Reader) checkSlots(slots Run, buf []byte) error {
	s := r.s
	if s.p.compressed() {
		if err := r.unpack(s, int(slots.Number/uint64(s.p.framePages))); err != nil {
			return err
		}
		buf = r.frame.buf
	} else if err := readFull(s.pages, buf[:slots.Pages*memory.PageSize], int64(slots.Number)*memory.PageSize); err != nil {
		return fmt.Errorf("snapshot %s: %s: %w", s.dir, PagesName, err)
	}
	for i := range slots.Pages {
		if !s.p.isUsed(slots.Number + i) {
			continue
		}
		if err := s.checkSlot(slots.Number+i, buf[i*memory.PageSize:][:memory.PageSize]); err != nil {
			return err
		}
	}
	return nil
}

// checkZeros checks that what belongs to no page reads as zeros.
func (s *Snapshot) checkZeros(ctx context.Context, at, size uint64) error {
	var buf [memory.PageSize]byte
	for size > 0 && ctx.Err() == nil {
		n := min(size, uint64(len(buf)))
		if err := readFull(s.pages, buf[:n], int64(at)); err != nil {
			return fmt.Errorf("snapshot %s: %s: %w", s.dir, PagesName, err)
		}
		if !layer.IsZero(buf[:n]) {
			return fmt.Errorf("snapshot %s: %w", s.dir, formatError("%s: something stands at %d, where no page is", PagesName, at))
		}
		at, size = at+n, size-n
	}
	return context.Cause(ctx)
}

// blocks reads all blocks that pages are named by.
func (v *verifying) blocks(ctx context.Context) error {
	runs := v.s.p.blocks
	buffers := make([][]byte, v.o.Workers)
	return parallel.Do(ctx, v.o.Workers, len(runs), func(_ context.Context, w, i int) error {
		if buffers[w] == nil {
			buffers[w] = make([]byte, maxBlockRun*memory.PageSize)
		}
		return v.note(v.s.p.runs[runs[i]].Pages*memory.PageSize, v.s.readBlocks(int(runs[i]), buffers[w]))
	})
}
