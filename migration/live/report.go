package live

import (
	"fmt"
	"time"
)

// Phase is what a migration is doing.
type Phase string

// The phases, in their order.
const (
	PhaseConnect Phase = "connect"  // connections, offer, what the destination says to it
	PhaseDisks   Phase = "disks"    // disks are copied, while the guest runs
	PhaseNames   Phase = "names"    // finding out what pages equal
	PhaseCopy    Phase = "copy"     // rounds, while the guest runs
	PhaseStop    Phase = "stop"     // the guest stands still
	PhaseCommit  Phase = "commit"   // committed, the destination takes over
	PhaseInDoubt Phase = "in-doubt" // the connection ended then; asking for the outcome
	PhasePull    Phase = "pull"     // post-copy: the guest runs there, pages follow
	PhaseDone    Phase = "done"
	PhaseFailed  Phase = "failed"
)

// Event tells how far a migration is. It comes with each change of phase and
// round, and a few times a second in between.
type Event struct {
	Phase   Phase         `json:"phase"`
	Round   int           `json:"round,omitempty"` // 1 is the first
	Elapsed time.Duration `json:"elapsed_ns"`
	// Done and Total count, in the phase "names", bytes of memory looked at, and
	// in rounds bytes of memory of this round dealt with.
	Done  uint64 `json:"done,omitempty"`
	Total uint64 `json:"total,omitempty"`
	// Sent is what went over the wire so far in all.
	Sent Traffic `json:"sent"`
	// Rate is bytes a second on the wire, over the last second or so.
	Rate uint64 `json:"rate,omitempty"`
	// DirtyRate is bytes of memory a second that the guest wrote in the last
	// round. A page written twice counts once.
	DirtyRate uint64 `json:"dirty_rate,omitempty"`
	// Left is the memory that the next round has to send, in bytes.
	Left uint64 `json:"left,omitempty"`
	// Expected is the downtime if the guest stood still now, 0 if not known.
	Expected time.Duration `json:"expected_downtime_ns,omitempty"`
	// Throttle is what the guest is slowed down by, in percent.
	Throttle int `json:"throttle,omitempty"`
	// VM is its name, known from the offer on.
	VM string `json:"vm,omitempty"`
	// Error says why it failed.
	Error string `json:"error,omitempty"`
}

// Traffic counts bytes on the wire, headers of frames included and TLS not.
type Traffic struct {
	Total uint64 `json:"total"`
	// Of pages, by how they traveled. Asked is the part of Raw and Zstd for
	// pages whose names or duplicates did not hold.
	Zero      uint64 `json:"zero"`
	Named     uint64 `json:"named"`
	Duplicate uint64 `json:"duplicate"`
	Raw       uint64 `json:"raw"`
	Zstd      uint64 `json:"zstd"`
	Asked     uint64 `json:"asked"`
	State     uint64 `json:"state"`
	Disk      uint64 `json:"disk"`
	// Back is what the destination sent.
	Back uint64 `json:"back"`
}

// Pages counts pages by how they traveled. A page that was sent in several
// rounds counts in each.
type Pages struct {
	Zero      uint64 `json:"zero"`
	Named     uint64 `json:"named"`
	Duplicate uint64 `json:"duplicate"`
	Raw       uint64 `json:"raw"`
	Zstd      uint64 `json:"zstd"`
	// Asked for as bytes, because names or duplicates did not hold.
	Asked uint64 `json:"asked"`
}

// Report is what a migration was, at its end, however it went.
type Report struct {
	Token Token `json:"token"`
	// Outcome is committed when the VM is the destination's, never when it stays
	// here, and unknown when it stands still here, since that could not be found
	// out ([InDoubtError]).
	Outcome Outcome `json:"outcome"`
	Where   string  `json:"where,omitempty"`
	Mode    string  `json:"mode"` // precopy, stop (by time-out, or since nothing is tracked), postcopy or shared
	RAM     uint64  `json:"ram"`  // bytes of guest memory
	Sent    Traffic `json:"sent"`
	Pages   Pages   `json:"pages"`
	Rounds  int     `json:"rounds"` // with the last one, in the pause
	// Names is how long it took to find names, Total all of it.
	Names time.Duration `json:"names_ns"`
	Total time.Duration `json:"total_ns"`
	// Downtime is from the pause until "running" came. Expected is what was
	// predicted.
	Downtime time.Duration `json:"downtime_ns"`
	Expected time.Duration `json:"expected_downtime_ns"`
	// Pull is how long pages followed in post-copy, after the downtime.
	Pull time.Duration `json:"pull_ns,omitempty"`
	// Throttle is the most that the guest was slowed down by, in percent.
	Throttle int `json:"throttle"`
	// Connections is the number of data connections.
	Connections int `json:"connections"`
}

// The modes of a report.
const (
	modePrecopy  = "precopy"
	modeShared   = "shared"
	modeStop     = "stop"
	modePostcopy = "postcopy"
)

// Result is what a destination knows of a migration at its end.
type Result struct {
	Token Token `json:"token"`
	// Offer is the VM's, with an empty name if none was accepted.
	Offer Offer `json:"offer"`
	// Committed says that the VM is this side's. With an error beside, it was
	// committed and does not run.
	Committed bool   `json:"committed"`
	Received  uint64 `json:"received"` // bytes
	Pages     Pages  `json:"pages"`
	// Took is from the first connection until the guest ran; Downtime of it from
	// the first word that the source stands still.
	Took     time.Duration `json:"took_ns"`
	Downtime time.Duration `json:"downtime_ns"`
}

// PeerError is what the other side said before it ended the migration.
type PeerError struct {
	Refused bool // it never began
	Reason  string
}

// Error implements error.
func (e *PeerError) Error() string {
	if e.Refused {
		return "the other side refused: " + e.Reason
	}
	return "the other side ended it: " + e.Reason
}

// InDoubtError says that the VM stands still here, because the connection ended
// in the moment of the commit and the destination could not be asked whether it
// took over. The user finds out, and resumes the VM or ends it.
type InDoubtError struct {
	Token Token
	Err   error
}

// Error implements error.
func (e *InDoubtError) Error() string {
	return fmt.Sprintf("the connection ended in the moment of the commit, and the destination does not say whether it took over (%v): "+
		"the VM stays paused; look whether it runs there, then take it back or stop it here", e.Err)
}

// Unwrap returns the cause.
func (e *InDoubtError) Unwrap() error { return e.Err }

// StuckError says that a migration failed before its commit point, but the VM
// could not go on: it is paused here, and runs nowhere else.
type StuckError struct {
	Err   error // why the migration failed
	Cause error // why the VM stays paused
}

// Error implements error.
func (e *StuckError) Error() string {
	return fmt.Sprintf("%v; the VM stays paused: %v", e.Err, e.Cause)
}

// Unwrap returns both causes.
func (e *StuckError) Unwrap() []error { return []error{e.Err, e.Cause} }
