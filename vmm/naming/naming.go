package naming

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"ditto.vm/devices/virtio/blk"
	"ditto.vm/guest/boot"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// Options of [New]. The zero value is right for most.
type Options struct {
	// Policy of the prover, [names.DefaultProverPolicy] when it is zero.
	Policy names.ProverPolicy
}

// Naming keeps the names of one VM's memory.
type Naming struct {
	table   *names.Table
	tracker *names.Watched
	prover  *names.Prover
	log     *slog.Logger

	mu      sync.Mutex // guards what follows
	files   map[boot.Source]names.LayerID
	sources []*source
	indexes []*guardedIndex
	stop    context.CancelFunc // nil while the prover stands
	done    chan struct{}
}

// New names the pages of a Space, with the tracker and the book of frames that
// the VM has. It installs the observer of the Space.
func New(space *memory.Space, tracker memory.Tracker, frames names.FrameBook, log *slog.Logger, o Options) *Naming {
	if o.Policy == (names.ProverPolicy{}) {
		o.Policy = names.DefaultProverPolicy()
	}
	table := names.NewTable(space)
	watched := names.Watch(space, tracker, table)
	space.SetObserver(watched)
	return &Naming{
		table: table, tracker: watched, log: log,
		prover: names.NewProver(space, table, watched, frames, o.Policy, log),
		files:  make(map[boot.Source]names.LayerID),
	}
}

// Table returns the names.
func (n *Naming) Table() *names.Table { return n.table }

// Tracker returns the tracker that everybody must use from now on: through it
// no write is forgotten before the name that it makes false.
func (n *Naming) Tracker() memory.Tracker { return n.tracker }

// Stats returns the table's counts.
func (n *Naming) Stats() names.Stats { return n.table.Stats() }

// Proves reports whether names are proven as the VM runs; with a tracker that
// cannot, they stay provisional.
func (n *Naming) Proves() bool { return n.prover.Active() }

// AddFile makes a kernel or initrd known, whose image stays open.
func (n *Naming) AddFile(source boot.Source, image *boot.Image) error {
	id, err := n.addFile(image.Name, image.Size, image.Reader)
	if err != nil {
		return fmt.Errorf("name memory by the %s: %w", source, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.files[source] = id
	return nil
}

// Loaded names the pages that a loader filled from files. Only where file and
// memory are aligned alike can pages be blocks.
func (n *Naming) Loaded(segments []boot.FileRange) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range segments {
		id, ok := n.files[s.Source]
		skip := -uint64(s.GPA) % memory.PageSize
		if !ok || skip >= s.Size || (uint64(s.Offset)+skip)%names.BlockSize != 0 {
			continue
		}
		gpa, block := s.GPA+memory.GPA(skip), (uint64(s.Offset)+skip)/names.BlockSize
		for left := s.Size - skip; left >= memory.PageSize; left -= memory.PageSize {
			n.table.Record(gpa, names.OfBlock(id, block))
			gpa, block = gpa+memory.PageSize, block+1
		}
	}
}

// Settle drops the names of pages that were written since they were proven, and
// of files that somebody changed although they are immutable. On a paused VM
// whose devices are drained every proven name is true afterwards.
func (n *Naming) Settle(ctx context.Context) error {
	n.Changed()
	return n.prover.Settle(ctx)
}

// Start lets the prover run until Stop. Twice is once.
func (n *Naming) Start() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.stop != nil || !n.prover.Active() {
		return
	}
	var ctx context.Context
	ctx, n.stop = context.WithCancel(context.Background())
	n.done = make(chan struct{})
	go func(done chan struct{}) {
		defer close(done)
		n.prover.Run(ctx)
	}(n.done)
}

// Stop waits for the prover to stand still. It may be started again.
func (n *Naming) Stop() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.stop == nil {
		return
	}
	n.stop()
	<-n.done
	n.stop = nil
}

// Close stops the prover, closes what was opened and frees the names. The tracker
// stays open; the Space's observer must be gone, since it uses them.
func (n *Naming) Close() error {
	n.Stop()
	n.mu.Lock()
	defer n.mu.Unlock()
	var errs []error
	for _, index := range n.indexes {
		errs = append(errs, index.Close())
	}
	for _, s := range n.sources {
		if s.watch != nil && s.watch.file != nil {
			errs = append(errs, s.watch.file.Close())
		}
	}
	n.indexes, n.sources = nil, nil
	errs = append(errs, n.table.Close())
	return errors.Join(errs...)
}

var _ blk.Observer = (*DiskObserver)(nil)
