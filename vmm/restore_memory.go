package vmm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/parallel"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/api"
)

// restored is the memory of a VM on its way out of a snapshot.
//
//	          mapped --------------------------------------> stays a view of files
//	page map  copied --touched, or in the background------> private
//	          zero  ---------------------------------------> empty
//
// Beside the guest it fetches what is missing, writes down what the guest touched
// first, and teaches the table of names what pages equal.
type restored struct {
	snapshot *snapshot.Snapshot
	dir      string // of the snapshot
	mode     RestoreMode
	log      *slog.Logger
	mem      *memory.Space
	vm       *VM

	root    string             // of the host's /proc and /sys
	mapped  uint64             // bytes
	files   map[*os.File]int64 // that are mapped, and to which of their bytes
	copied  uint64             // bytes that were read before the guest ran
	pages   *snapshot.Pages
	missing *memory.Missing // nil when nothing is, or was

	set    *os.File // gets the working set; nil when it is written, or not wanted
	record recording

	// layers has the table's numbers of the layers that pages are named by.
	layers   map[namedLayer]names.LayerID
	teaching sync.Mutex // guards taught
	taught   int        // how many runs of blocks were

	prefetched chan struct{}      // closed when that is done; nil for none
	stop       context.CancelFunc // of the prefetch
	done       atomic.Bool        // nothing depends on the snapshot but what is mapped
	closed     atomic.Bool
}

// What is mapped: each row costs a mapping and some microseconds at the restore,
// and each page of it a fault; below that size copying in the background is as
// good, and the longest rows go first.
const (
	mapMinPages = 16
	mapMost     = 2048
)

// fetchRate bounds what is fetched in the background, in bytes a second: it takes
// a tenth of a core to prove them.
const fetchRate = 128 << 20

// fill makes memory what the snapshot says, as far as the mode wants it now. What
// it opens goes with the VM.
func (r *restored) fill(ctx context.Context, m *VM) error {
	r.vm, r.mem, r.log = m, m.mem, m.log
	m.restored = r
	m.cleanup.add(r.close)
	if r.mode == RestoreEager {
		return r.load(ctx)
	}
	plan, err := r.snapshot.Plan(ctx, snapshot.PlanOptions{MinPages: mapMinPages, MaxMappings: mapMost, Copied: r.bootFiles()})
	if err != nil {
		return err
	}
	if err := r.room(plan.Copied); err != nil {
		return err
	}
	err = r.mem.MapFiles(plan.Maps...)
	if errors.Is(err, memory.ErrNotPrivate) {
		m.log.Warn("memory is read before the guest runs, since it cannot be mapped", "err", err, "cure", "use --memory anonymous without --hugepages 2M or 1G, or --eager if that is meant")
		return r.load(ctx)
	}
	if errors.Is(err, unix.ENOMEM) {
		m.log.Warn("memory is read before the guest runs, since the process may have no more mappings", "err", err, "cure", "raise vm.max_map_count")
		if err := r.mem.Clear(); err != nil {
			return err
		}
		return r.load(ctx)
	}
	if err != nil {
		return err
	}
	r.mapped, r.files = plan.Mapped, ends(plan.Maps)
	if err := r.await(ctx, plan.Copy, plan.Copied); err != nil {
		return err
	}
	r.beginRecord()
	if r.mode == RestorePrefetch {
		r.beginPrefetch()
	}
	return nil
}

// load reads all of memory.
func (r *restored) load(ctx context.Context) error {
	h := r.snapshot.Manifest().Holds
	all := h.Blocks + h.Duplicate + h.Parent + h.Unique
	if err := r.room(all); err != nil {
		return err
	}
	err := r.snapshot.Load(ctx, r.mem, snapshot.LoadOptions{})
	r.copied = all
	return err
}

// room checks that the host has memory for what is read. What is mapped takes none
// but that of files, and zeros take none at all.
func (r *restored) room(bytes uint64) error {
	return checkRoom(r.root, bytes, "the restored guest takes at once")
}

// ends returns up to which byte files are mapped.
func ends(maps []memory.FileRange) map[*os.File]int64 {
	all := map[*os.File]int64{}
	for _, m := range maps {
		all[m.File] = max(all[m.File], m.Offset+int64(m.Size))
	}
	return all
}

// cutShort names the files that do not have any more what is mapped of them.
func (r *restored) cutShort() (names []string) {
	for f, end := range r.files {
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() && info.Size() < end {
			names = append(names, fmt.Sprintf("%s has %d bytes, of which %d are needed", f.Name(), info.Size(), end))
		}
	}
	slices.Sort(names)
	return names
}

// await lets pages be fetched when they are touched. Where nobody may serve KVM's
// faults they are read now.
func (r *restored) await(ctx context.Context, waiting *memory.PageSet, bytes uint64) error {
	if bytes == 0 {
		return nil
	}
	r.pages = r.snapshot.Pages()
	kind := r.vm.cfg.Memory.Tracker
	missing, err := r.mem.OpenMissing(r.pages, waiting, memory.MissingOptions{
		TrackWrites: kind == memory.TrackerAuto || kind == memory.TrackerWPAsync,
		Failed:      r.vm.memoryFailed,
	})
	if errors.Is(err, memory.ErrUnsupported) {
		r.log.Warn("memory that cannot be mapped is read before the guest runs", "bytes", bytes, "err", err)
		r.copied = bytes
		return r.read(ctx, slices.Collect(waiting.Runs()))
	}
	r.missing = missing
	return err
}

// readPages is how many pages a worker reads at once.
const readPages = 256

// read reads pages into memory.
func (r *restored) read(ctx context.Context, ranges []memory.Range) error {
	return eachPiece(ctx, runtime.NumCPU(), pieces(ranges, readPages*memory.PageSize), func(piece memory.Range) error {
		dst, err := r.mem.Writable(piece.Start, piece.Size)
		if err != nil {
			return err
		}
		err = r.pages.ReadPages(piece.Start.GFN(), dst)
		r.mem.Wrote(piece.Start, piece.Size)
		return err
	})
}

// pieces cuts ranges into pieces of at most size bytes.
func pieces(ranges []memory.Range, size uint64) []memory.Range {
	var all []memory.Range
	for _, r := range ranges {
		for at := r.Start; at < r.End(); at += memory.GPA(size) {
			all = append(all, memory.Range{Start: at, Size: min(size, uint64(r.End()-at))})
		}
	}
	return all
}

// eachPiece calls do with every piece, on so many goroutines.
func eachPiece(ctx context.Context, hands int, all []memory.Range, do func(memory.Range) error) error {
	return parallel.Do(ctx, hands, len(all), func(_ context.Context, _, i int) error { return do(all[i]) })
}

// run does what goes on beside the guest until ctx ends. It begins anew where it
// was, and does nothing when all is done.
func (r *restored) run(ctx context.Context) {
	if r.done.Load() || !r.recordFor(ctx) {
		return
	}
	if r.missing != nil && !r.missing.Done() {
		switch err := r.missing.Run(ctx, fetchRate); {
		case ctx.Err() != nil:
			return
		case err != nil:
			r.log.Warn("a part of guest memory cannot be had; the guest ends when it needs it", "err", err, "bytes", r.missing.Stats().Waiting)
			return
		}
	}
	if r.prefetched != nil {
		select {
		case <-r.prefetched:
		case <-ctx.Done():
			return
		}
	}
	if r.teach(ctx) {
		r.finish()
	}
}

// finish gives back what is known of the snapshot: what is mapped stays so, and
// keeps its layers from being written.
func (r *restored) finish() {
	r.teaching.Lock()
	defer r.teaching.Unlock()
	if r.done.Swap(true) {
		return
	}
	r.layers = nil
	if r.pages != nil {
		r.pages.Close()
	}
	if err := r.snapshot.Retire(); err != nil {
		r.log.Warn("close the snapshot that was restored", "err", err)
	}
}

// restart says that the guest begins anew, with empty memory. Background work
// stands still.
func (r *restored) restart() {
	if err := r.endRecord(); err != nil {
		r.log.Warn("what the guest touched first is not recorded for the next restore", "err", err)
	}
	r.halt()
	r.finish()
}

// halt ends the prefetch.
func (r *restored) halt() {
	if r.prefetched != nil {
		r.stop()
		<-r.prefetched
	}
}

// close ends everything. Nobody touches memory any more.
func (r *restored) close() error {
	if r.closed.Swap(true) {
		return nil
	}
	r.halt()
	errs := []error{r.endRecord()}
	if r.missing != nil {
		errs = append(errs, r.missing.Close())
	}
	if r.pages != nil {
		r.pages.Close()
	}
	return errors.Join(append(errs, r.snapshot.Close())...)
}

// bootFiles returns which layers are what the guest boots: other than disks, such
// files are written without being locked, so that nothing is mapped from them.
func (r *restored) bootFiles() func(of *snapshot.Snapshot, layer int) bool {
	files := map[fileID]bool{}
	for _, path := range []string{r.vm.cfg.Kernel, r.vm.cfg.Initrd} {
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil {
			files[fileID{st.Dev, st.Ino}] = true
		}
	}
	return func(of *snapshot.Snapshot, layer int) bool {
		stamp, err := of.LayerStamp(layer)
		return err == nil && files[fileID{stamp.Device, stamp.Inode}]
	}
}

// stats is what became of memory.
func (r *restored) stats() *api.RestoreStats {
	s := &api.RestoreStats{Mode: r.mode.String(), MappedBytes: r.mapped, CopiedBytes: r.copied}
	if r.missing != nil {
		m := r.missing.Stats()
		s.CopiedBytes, s.MissingBytes, s.Faults = s.CopiedBytes+m.Copied, m.Waiting, m.Faults
	}
	return s
}

// memoryFailed hears that a page of memory that the guest or a device waits for
// cannot be had. The guest cannot go on.
func (m *VM) memoryFailed(err error) {
	err = fmt.Errorf("guest memory cannot be restored: %w", err)
	if !m.memoryError.CompareAndSwap(nil, &err) {
		return
	}
	go func() {
		m.mu.Lock()
		made := m.state != api.Created
		m.mu.Unlock()
		if made {
			m.end(Exit{Reason: ExitFailed, Err: err})
		}
	}()
}

// explain returns why a vCPU that could not touch memory really failed.
func (m *VM) explain(err error) error {
	if known := m.memoryError.Load(); known != nil {
		return *known
	}
	if r := m.restored; r != nil && r.mapped > 0 && errors.Is(err, unix.EFAULT) {
		if files := r.cutShort(); len(files) > 0 {
			return fmt.Errorf("%w: guest memory of the snapshot %s was cut short while it was in use: %s", err, r.dir, strings.Join(files, ", "))
		}
		return fmt.Errorf("%w: guest memory is mapped from the snapshot %s and the disks below it, one of which may have been cut short: check with 'ditto snapshot verify'", err, r.dir)
	}
	return err
}
