package live

import (
	"context"
	"encoding/json"
	"io"

	"ditto.vm/images/layer"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/migration/state"
)

// Offer describes a VM before a byte of its memory moves. The destination
// accepts it as a whole or says what it lacks.
type Offer struct {
	// Name of the VM, Ditto the version that runs it.
	Name  string `json:"name"`
	Ditto string `json:"ditto"`
	// Config is what the VM was made of, as the source's disks are now
	// (vmm/config in JSON).
	Config json.RawMessage `json:"config"`
	// RAM are the ranges of guest memory.
	RAM []memory.Range `json:"ram"`
	// CPU is the state section "cpu" as far as it is known before the pause:
	// the guest's CPUID and the frequency of its time-stamp counter.
	CPU state.Section `json:"cpu"`
	// Layers are what names of pages refer to, by their index.
	Layers []Layer `json:"layers"`
	// Storage says how the other side comes by the disks; CopyLayers lets it ask
	// for images that nobody writes, too. Disks are those of the configuration.
	Storage    Storage `json:"storage,omitempty"`
	CopyLayers bool    `json:"copy_layers,omitempty"`
	Disks      []Disk  `json:"disks,omitempty"`
	// Bases are images of the destination's host in which it looks for layers
	// that it lacks. They are not sent.
	Bases []string `json:"-"`
	// Untracked says that nobody knows which pages the guest writes: it stands
	// still before the first one is sent.
	Untracked bool `json:"untracked,omitempty"`
	// Shared says that both sides map the same files as guest memory: no page is
	// sent.
	Shared bool `json:"shared,omitempty"`
	// Paused says that somebody has paused the VM: it arrives so.
	Paused bool `json:"paused,omitempty"`
}

// Layer is a disk layer or boot file that pages are named by.
type Layer struct {
	ID     layer.ID `json:"id,omitzero"`
	Path   string   `json:"path"`
	Format string   `json:"format"`
	Size   int64    `json:"size"`
	// Disk is the disk whose chain it is in, -1 for a boot file, and Depth where
	// there: 0 is the top.
	Disk  int `json:"disk"`
	Depth int `json:"depth"`
	// Written says that the guest writes it: the top of a writable disk.
	Written bool `json:"written"`
}

// Recorded is what is known of the names of pages on the source. They are hints:
// each is sent with the digest of the page's bytes.
type Recorded interface {
	// Load fills dst with the names of pages from gfn up. Block names have
	// [Offer.Layers]' indexes as their layers, and names of other pages are of
	// pages that held the same bytes.
	Load(dst []names.Name, gfn memory.GFN)
}

// SourceVM is the VM that leaves. All of it is called by one goroutine.
type SourceVM interface {
	// Offer describes the VM.
	Offer(ctx context.Context) (Offer, error)
	// Memory is the guest's memory, which may be read at any time.
	Memory() *memory.Space
	// Blocks reads the VM's disks; nil if they cannot be copied.
	Blocks() BlockSource
	// Begin lets writes be tracked: what Collect returns first is all that was
	// written since. Who works on memory beside the guest stands still until End.
	// It fails when the VM is saved or migrated already.
	Begin(ctx context.Context) error
	// Names finds out what pages equal, while the guest runs.
	Names(ctx context.Context, progress func(done, total uint64)) (Recorded, error)
	// Collect adds the pages that were written since the last call, and tracks
	// them anew before it returns. In the pause it is complete.
	Collect(into *memory.PageSet) error
	// Throttle takes a share of the vCPUs' time from the guest, 0 to 99 percent.
	Throttle(percent int)
	// Pause stops the guest, Resume lets it go on. Between them nothing changes
	// its memory but State, which comes before the last Collect.
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	State(ctx context.Context) ([]state.Section, error)
	// ReleaseDisks flushes the disks and gives up their locks; ReclaimDisks takes
	// them back, for a migration that failed before the commit point. It fails if
	// somebody else has them, or has written them, and is tried again for a while.
	// It is called after a ReleaseDisks that failed, too.
	ReleaseDisks(ctx context.Context) error
	ReclaimDisks(ctx context.Context) error
	// End undoes Begin: the VM stays as it is, running or paused.
	End() error
	// Committed says that the guest runs somewhere else and never here again, but
	// that its memory is still needed (post-copy). The channel is closed when
	// somebody ends the VM nevertheless.
	Committed() (ended <-chan struct{})
	// Left ends the VM, which runs somewhere else now.
	Left(where string)
}

// DestinationVM makes the VM that arrives.
type DestinationVM interface {
	// Prepare looks whether the VM can run here, and makes its memory. What it
	// cannot do is an error that names what is missing, for both sides' users.
	// It takes no lock of a disk.
	Prepare(ctx context.Context, o Offer) (Arrival, error)
}

// Arrival is a VM under way. Its memory is filled first.
type Arrival interface {
	// Memory is the guest's memory, all holes.
	Memory() *memory.Space
	// Blocks takes the disks that are copied; nil if none can be.
	Blocks() BlockTarget
	// Layer reads a layer of the offer from what lies here. It is nil if that
	// layer is not here. Bytes may be stale: each page is proven by its digest. One
	// that is a [Learner] hears of pages that were.
	Layer(n int) io.ReaderAt
	// Construct makes the VM, paused: it takes the disks' locks and opens them
	// cold. Pages in missing, which are holes, come later, from source, which is
	// an [Arrivals] too (post-copy); nil for none. Both belong to the VM then. The
	// source waits while the network is lost, and fails when Receive is canceled.
	Construct(ctx context.Context, sections []state.Section, missing *memory.PageSet, source memory.PageSource) error
	// Run lets the guest go on. It is called after the commit point.
	Run(ctx context.Context) error
	// Abandon frees everything. Nothing has run.
	Abandon() error
}

// Learner is a layer that hears which pages were made of its blocks: those in a
// row from block on. It is called by any goroutine. A page may come again as bytes
// later, which it does not hear of.
type Learner interface {
	Learn(pages memory.Range, block uint64)
}
