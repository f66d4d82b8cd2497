package remotemigrate

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"ditto.vm/images/disk"
	"ditto.vm/migration/live"
	"ditto.vm/migration/pki"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/lend"
)

// operation is the name that both ends know.
const operation = "migrate"

// askConnect asks for a connection to the destination.
const askConnect = "connect"

// connectArgs go with askConnect.
type connectArgs struct {
	// Again: the outcome is to be asked for. A client that was told to cancel
	// connects nevertheless.
	Again bool `json:"again,omitempty"`
}

// MaxConnects bounds how often a machine may ask for a connection in one
// migration.
const MaxConnects = 1024

// Errors that a client decides by.
var (
	// ErrInDoubt stands for a [live.InDoubtError].
	ErrInDoubt = errors.New("the outcome of a migration is not known")
	// ErrStuck stands for a [live.StuckError].
	ErrStuck = errors.New("the machine stands still after a migration that failed")
	// ErrRefused stands for a [live.PeerError] of a destination that never began.
	ErrRefused = errors.New("the destination refused")
	// ErrBusy is wrapped when a migration of the machine is under way.
	ErrBusy = errors.New("a migration of this machine is under way")
)

// Kinds are the errors that a migration is decided by.
func Kinds() lend.Kinds {
	return lend.Kinds{
		"in-doubt":       ErrInDoubt,
		"stuck":          ErrStuck,
		"refused":        ErrRefused,
		"migrating":      ErrBusy,
		"busy":           snapshot.ErrBusy,
		"tls":            pki.ErrTLS,
		"locked":         disk.ErrLocked,
		"state":          api.ErrWrongState,
		"ending":         lend.ErrEnding,
		"gone":           lend.ErrGone,
		"cannot-connect": ErrConnect,
	}
}

// Options say how to migrate, on their way to the machine.
type Options struct {
	// Where is the destination, for people.
	Where string `json:"where"`
	// TLS is nil for a connection that is not encrypted by ditto.
	TLS *TLS `json:"tls,omitempty"`
	// Trusted says that the way keeps bytes whole by itself: TLS, ssh, or no
	// network at all.
	Trusted bool `json:"trusted,omitempty"`
	// Shared and SameHost are those of [live.Options], for an upgrade.
	Shared      bool               `json:"shared,omitempty"`
	SameHost    bool               `json:"same_host,omitempty"`
	Connections int                `json:"connections"`
	NoNames     bool               `json:"no_names,omitempty"`
	Proof       live.Proof         `json:"proof,omitempty"`
	Compression live.Compression   `json:"compression,omitempty"`
	Bandwidth   uint64             `json:"bandwidth,omitempty"`
	Downtime    time.Duration      `json:"downtime_ns,omitempty"`
	Timeout     time.Duration      `json:"timeout_ns,omitempty"`
	OnTimeout   live.TimeoutPolicy `json:"on_timeout,omitempty"`
	NoThrottle  bool               `json:"no_throttle,omitempty"`
	Postcopy    bool               `json:"postcopy,omitempty"`
	Verify      bool               `json:"verify,omitempty"`
	Stall       time.Duration      `json:"stall_ns,omitempty"`
	Disks       live.Storage       `json:"disks,omitempty"`
	CopyLayers  bool               `json:"copy_layers,omitempty"`
}

// TLS is what a machine shows to the destination, and what it wants to see.
type TLS struct {
	pki.Credentials
	// Name is what the destination's certificate must be for.
	Name string `json:"name"`
}

// Bounds of the options.
const (
	MaxConnections = 64
	maxWhere       = 1024 // bytes
	maxTime        = 30 * 24 * time.Hour
)

// Check reports options that no migration can have.
func (o Options) Check() error {
	switch {
	case o.Where == "" || len(o.Where) > maxWhere || strings.ContainsFunc(o.Where, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return fmt.Errorf("the destination %.100q", o.Where)
	case o.Connections < 0 || o.Connections > MaxConnections:
		return fmt.Errorf("%d connections: use 0 to %d", o.Connections, MaxConnections)
	case o.Proof != "" && o.Proof != live.ProofXXH3 && o.Proof != live.ProofBLAKE3:
		return fmt.Errorf("proof %q: use xxh3 or blake3", o.Proof)
	case o.Compression != "" && o.Compression != live.Uncompressed && o.Compression != live.Zstd:
		return fmt.Errorf("compression %q: use none or zstd", o.Compression)
	case o.OnTimeout != "" && o.OnTimeout != live.TimeoutAbort && o.OnTimeout != live.TimeoutStop && o.OnTimeout != live.TimeoutPostcopy:
		return fmt.Errorf("on-timeout %q: use abort, stop or postcopy", o.OnTimeout)
	case o.Disks != live.StorageProven && o.Disks != live.StorageShared && o.Disks != live.StorageCopied:
		return fmt.Errorf("disks %q: use shared or copy", o.Disks)
	case o.CopyLayers && o.Disks != live.StorageCopied:
		return errors.New("--copy-layers is for --disks copy")
	}
	for _, d := range []time.Duration{o.Downtime, o.Timeout, o.Stall} {
		if d < 0 || d > maxTime {
			return fmt.Errorf("the time %s: use up to %s", d, maxTime)
		}
	}
	if o.TLS != nil {
		if _, err := o.TLS.Client(o.TLS.Name); err != nil {
			return err
		}
	}
	return nil
}

// live returns the options as a migration takes them.
func (o Options) live() live.Options {
	return live.Options{
		Disks: o.Disks, CopyLayers: o.CopyLayers,
		Connections: o.Connections, Trusted: o.Trusted || o.TLS != nil, NoNames: o.NoNames,
		Proof: o.Proof, Compression: o.Compression, Bandwidth: o.Bandwidth,
		Downtime: o.Downtime, Timeout: o.Timeout, OnTimeout: o.OnTimeout, NoThrottle: o.NoThrottle,
		Postcopy: o.Postcopy, Verify: o.Verify, Stall: o.Stall, Where: o.Where, Shared: o.Shared, SameHost: o.SameHost,
	}
}
