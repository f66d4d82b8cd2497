package naming

import (
	"context"
	"errors"
	"fmt"
	"io"
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
	watched []*watchedFile
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

// Disk is a disk whose blocks name pages.
type Disk struct {
	// Path is the file; its index lies beside it.
	Path string
	// Source reads what the guest would read, from any goroutine.
	Source io.ReaderAt
	// Size in bytes.
	Size int64
	// Immutable says that nobody writes the disk while the VM runs.
	Immutable bool
}

// AddDisk makes a disk known and returns what its device tells of its I/O. An
// index beside the image is opened if it is the image's; a bad one is announced
// and not used.
func (n *Naming) AddDisk(d Disk) (*DiskObserver, error) {
	layer := names.Layer{Title: d.Path, Size: d.Size, Immutable: d.Immutable, Source: d.Source}
	index := n.openIndex(d)
	if index != nil {
		layer.Index = index
	}
	id, err := n.table.AddLayer(layer)
	if index != nil {
		index.layer = id
		n.mu.Lock()
		n.indexes = append(n.indexes, index)
		n.mu.Unlock()
	}
	if err != nil {
		return nil, fmt.Errorf("name memory by disk %s: %w", d.Path, err)
	}
	if d.Immutable {
		n.watchFile(id, d.Path)
	}
	return &DiskObserver{table: n.table, layer: id}, nil
}

// AddFile makes a kernel or initrd known, whose image stays open.
func (n *Naming) AddFile(source boot.Source, image *boot.Image) error {
	id, err := n.table.AddLayer(names.Layer{Title: image.Name, Size: image.Size, Immutable: true, Source: image.Reader})
	if err != nil {
		return fmt.Errorf("name memory by the %s: %w", source, err)
	}
	n.watchFile(id, image.Name)
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
	n.checkFiles()
	n.CheckIndexes()
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
	for _, w := range n.watched {
		errs = append(errs, w.file.Close())
	}
	n.indexes, n.watched = nil, nil
	errs = append(errs, n.table.Close())
	return errors.Join(errs...)
}

var _ blk.Observer = (*DiskObserver)(nil)
