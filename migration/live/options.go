package live

import (
	"context"
	"log/slog"
	"net"
	"time"

	"ditto.vm/migration/wire"
)

// Dialer makes one connection to the destination, ready for use: what it is
// encrypted with, and who may be at its other end, is the caller's business.
type Dialer func(ctx context.Context) (net.Conn, error)

// Accepter returns the next connection that a source made. It returns when the
// context ends. [AcceptFrom] makes one of a listener.
type Accepter func(ctx context.Context) (net.Conn, error)

// Token names a migration. It is drawn at random by the source.
type Token = wire.Token

// Proof selects the digest by which a named page is proven.
type Proof string

// The proofs.
const (
	// ProofXXH3 is XXH3-128 with a secret random seed for each migration.
	ProofXXH3 Proof = "xxh3"
	// ProofBLAKE3 is BLAKE3, cut to 16 bytes: slower, and no two contents with
	// one digest can be made even by who knows the seed.
	ProofBLAKE3 Proof = "blake3"
)

// Compression selects what is done to pages that travel as bytes.
type Compression string

// The compressions.
const (
	Uncompressed Compression = "none"
	Zstd         Compression = "zstd"
)

// TimeoutPolicy says what happens when pre-copy takes too long.
type TimeoutPolicy string

// The policies.
const (
	// TimeoutAbort ends the migration; the VM stays.
	TimeoutAbort TimeoutPolicy = "abort"
	// TimeoutStop stops the guest and sends what is left, however long it takes.
	TimeoutStop TimeoutPolicy = "stop"
	// TimeoutPostcopy lets the guest run at the destination, which fetches what
	// is left.
	TimeoutPostcopy TimeoutPolicy = "postcopy"
)

// DefaultConnections is how many data connections a source opens over TCP.
const DefaultConnections = 4

// Options say how a VM is sent. The zero value is filled with defaults, except
// for Connections, whose zero means something.
type Options struct {
	// Connections is the number of data connections; with 0 pages travel on the
	// control connection.
	Connections int
	// Trusted says that the transport keeps bytes whole (TLS, ssh):
	// pages are then sent straight from guest memory, without a checksum.
	Trusted bool
	// Disks says where the disks are, proven to be shared by default. With
	// CopyLayers images that nobody writes and that the destination lacks are sent
	// too.
	Disks      Storage
	CopyLayers bool
	// NoNames sends bytes only.
	NoNames bool
	// Proof is by what names are proven, XXH3 by default.
	Proof Proof
	// Compression of pages that travel as bytes, none by default.
	Compression Compression
	// Bandwidth limits what is sent while the guest runs, in bytes a second; 0
	// is no limit.
	Bandwidth uint64
	// Shared says that the destination has got the files that are the guest's
	// memory: none of it is sent.
	Shared bool
	// SameHost says that the destination takes over the VM's name, and what else
	// it has on this host. It is for the caller's [SourceVM].
	SameHost bool
	// Downtime is how long the guest may stand still, as predicted; 300 ms by
	// default.
	Downtime time.Duration
	// Timeout is how long pre-copy may take before OnTimeout is done, 0 for ever.
	Timeout   time.Duration
	OnTimeout TimeoutPolicy // abort by default
	// NoThrottle never slows the guest down, even if it writes faster than pages
	// can be sent.
	NoThrottle bool
	// Postcopy lets the guest run at the destination after one round, if what is
	// left then would take longer than Downtime; it is fetched from there.
	Postcopy bool
	// Verify compares digests of all memory while both sides stand still: for
	// tests, since it takes time from the guest.
	Verify bool
	// Stall is after how long without progress the peer counts as gone, 30 s by
	// default. While the guest stands still it is a third of it.
	Stall time.Duration
	// OutcomeLimit is how long the source asks for the outcome after the
	// connection ended in the moment of the commit, 1 min by default.
	OutcomeLimit time.Duration
	// Where says where the VM goes, for people: ADDR of tcp://ADDR.
	Where string
	// Events hears of progress, from one goroutine at a time; nil for nobody. It
	// must not block.
	Events func(Event)
	// Log may be nil.
	Log *slog.Logger
}

// ReceiveOptions say how a VM is received.
type ReceiveOptions struct {
	// Ditto is the version of this program, for messages.
	Ditto string
	// Stall is as of [Options].
	Stall time.Duration
	// Postcopy says that pages may be missing when the guest begins to run:
	// [memory.Space.OpenMissing] works here.
	Postcopy bool
	// HelloLimit is how long a new connection may take to say what it is, TLS
	// handshake included; 5 s by default.
	HelloLimit time.Duration
	// Begin is told which migration was offered, before the VM is prepared. What
	// it records lets others tell a migration that ended here without Committed,
	// and so never will, from one that they know nothing of. If it fails, the
	// offer is refused. nil records nothing.
	Begin func(Token) error
	// Committed records, where it outlives this process, that the VM of this
	// migration is the destination's from now on. It is called once, at the
	// commit point, before the source is told and before the guest runs. If it
	// fails, nothing may have been recorded, the guest never runs here, and the
	// source takes the VM back. nil records nothing.
	Committed func(Token) error
	// Outcome answers for migrations other than this one; nil knows of none.
	Outcome func(Token) Outcome
	// Events, Log are as of [Options].
	Events func(Event)
	Log    *slog.Logger
}

// Outcome is what became of a migration, as the destination tells.
type Outcome = wire.Outcome

// The outcomes.
const (
	// OutcomeUnknown: the destination knows nothing of it.
	OutcomeUnknown = wire.OutcomeUnknown
	// OutcomePending: not decided yet; ask again.
	OutcomePending = wire.OutcomePending
	// OutcomeCommitted: the VM is the destination's.
	OutcomeCommitted = wire.OutcomeCommitted
	// OutcomeNever: the VM did not run at the destination and never will.
	OutcomeNever = wire.OutcomeNever
)
