package memory

import (
	"errors"
	"fmt"
	"strings"
)

// Tracker tells which pages of guest memory were written since they were armed.
//
//	      Arm                Collect(Rearm)         Disarm
//	 ------|----- writes -----|----- writes ---------|------
//	counts |  what is not     | what is not reported | counts
//	as     |  reported is     | next time is what    | as
//	written|  unchanged       | it was here          | written
//
// What a tracker promises: a page that [Tracker.Collect] does not report holds
// the bytes it held when it was armed last, and a page that was never armed, or
// disarmed, is reported, unless it was never populated and so is zero. It may
// report a page that was not written; it never omits one that was, except as
// its [TrackerKind.Misses] says.
//
// What it asks of the caller: I/O by the host into guest memory is reported with
// [Space.Wrote] when it completes, as are discards; the tracker is the Space's
// observer. Until then the page counts as unwritten although a device may be
// writing to it, so a caller that needs the truth drains the devices first.
// Ranges are page-aligned and lie inside one RAM region.
//
// All methods may be called from any goroutine.
type Tracker interface {
	WriteObserver
	// Kind returns which implementation this is.
	Kind() TrackerKind
	// Arm makes the tracker report writes to r from now on, and forget those
	// before. Arm large frames whole and when they are quiet: the first write
	// to an armed frame makes it small.
	Arm(r Range) error
	// Collect adds the written pages of r to into, which is a set over the
	// whole Space, and re-arms them as mode says, without losing a write
	// between the two.
	Collect(r Range, into *PageSet, mode CollectMode) error
	// Disarm stops tracking r: all of it counts as written.
	Disarm(r Range) error
	// Remapped tells the tracker that r was mapped anew (mmap with MAP_FIXED)
	// and is not armed any more: all of it counts as written.
	Remapped(r Range) error
	// Close stops tracking and gives back what the tracker holds. The Space
	// must still be open, and no longer report writes to the tracker.
	Close() error
}

// CollectMode says what [Tracker.Collect] does with the pages it reports.
type CollectMode int

const (
	// Rearm arms every reported page: the next Collect reports what was
	// written after this one. For rounds of a migration or a snapshot.
	Rearm CollectMode = iota
	// RearmSmall arms the reported pages of small frames and leaves frames
	// that the host maps large alone, since arming one that is being written
	// would break it. Those are reported until they are armed. For naming.
	RearmSmall
	// Peek arms nothing and forgets nothing: the next Collect reports the same
	// pages again. For looking.
	Peek
)

// TrackerKind names an implementation of [Tracker].
type TrackerKind int

// The trackers. The zero value leaves the choice to [OpenTracker].
const (
	TrackerAuto TrackerKind = iota
	// TrackerWPAsync: userfaultfd WP_ASYNC and PAGEMAP_SCAN (Linux 6.7).
	TrackerWPAsync
	// TrackerKVMLog: KVM's dirty bitmap, joined with the VMM's own writes.
	TrackerKVMLog
	// TrackerKVMRing: KVM's dirty ring, joined with the VMM's own writes.
	TrackerKVMRing
	// TrackerNone: every page may have been written.
	TrackerNone
)

var trackerNames = [...]string{"auto", "wp-async", "kvm-log", "kvm-ring", "none"}

// String returns the flag value: auto, wp-async, kvm-log, kvm-ring or none.
func (k TrackerKind) String() string {
	if k < 0 || int(k) >= len(trackerNames) {
		return fmt.Sprintf("TrackerKind(%d)", int(k))
	}
	return trackerNames[k]
}

// MarshalText implements encoding.TextMarshaler.
func (k TrackerKind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (k *TrackerKind) UnmarshalText(text []byte) error {
	for i, name := range trackerNames {
		if strings.EqualFold(string(text), name) {
			*k = TrackerKind(i)
			return nil
		}
	}
	return fmt.Errorf("unknown tracker %q: use %s", text, strings.Join(trackerNames[:], ", "))
}

// Sees says in one line which writes the tracker finds by itself.
func (k TrackerKind) Sees() string {
	switch k {
	case TrackerWPAsync:
		return "writes by vCPUs and by the VMM through the mapping"
	case TrackerKVMLog, TrackerKVMRing:
		return "writes by vCPUs"
	}
	return "nothing"
}

// Misses says in one line which writes reach the tracker only through
// [Space.Wrote], or not at all.
func (k TrackerKind) Misses() string {
	switch k {
	case TrackerWPAsync:
		return "reported: discards, and I/O that was in flight when its page was armed; not at all: writes to a file mapped privately"
	case TrackerKVMLog, TrackerKVMRing:
		return "reported: writes by the VMM and discards; not at all: writes to a file mapped privately, and by other processes to a memfd"
	}
	return "everything: every page counts as written"
}

// Errors of trackers.
var (
	// ErrUnsupported: this kernel, KVM or kind of memory cannot carry the
	// tracker. It is wrapped by a [TrackerError] that says what is missing.
	ErrUnsupported = errors.New("tracker not supported here")
	// ErrPartOfLargeFrame: the range covers a part of a frame that the host
	// maps large, and arming or disarming it would break the frame.
	ErrPartOfLargeFrame = errors.New("range covers a part of a large frame")
	// ErrNotRegistered: the range was mapped anew and [Tracker.Remapped] was
	// not called, so nothing is known about it.
	ErrNotRegistered = errors.New("range was mapped anew and is not registered with the tracker")
)

// TrackerError says why a tracker cannot be used.
type TrackerError struct {
	Kind   TrackerKind
	Reason string // what is missing, and the cure where there is one
	Err    error  // the cause, or nil
}

// Error implements error.
func (e *TrackerError) Error() string {
	if e.Err == nil {
		return fmt.Sprintf("tracker %s: %s", e.Kind, e.Reason)
	}
	return fmt.Sprintf("tracker %s: %s: %v", e.Kind, e.Reason, e.Err)
}

// Unwrap returns ErrUnsupported and the cause.
func (e *TrackerError) Unwrap() []error { return []error{ErrUnsupported, e.Err} }

// part is the overlap of a tracked range with a region, checked.
type part struct {
	region *Region
	index  int // of the region
	Range
}

// locate checks that r is page-aligned and lies inside one region.
func (s *Space) locate(r Range) (part, error) {
	if uint64(r.Start)%PageSize != 0 || r.Size%PageSize != 0 {
		return part{}, fmt.Errorf("range [%s, +%#x) is not page-aligned", r.Start, r.Size)
	}
	for i := range s.regions {
		if s.regions[i].Contains(r.Start, r.Size) {
			return part{region: &s.regions[i], index: i, Range: r}, nil
		}
	}
	return part{}, fmt.Errorf("[%s, +%#x): %w", r.Start, r.Size, ErrOutOfRange)
}

// whole reports whether the part is its whole region.
func (p part) whole() bool { return p.Range == p.region.Range }

// hva returns the host address of a guest address in the part's region.
func (p part) hva(gpa GPA) uintptr { return uintptr(p.region.HVA) + uintptr(gpa-p.region.Start) }

// gpa returns the guest address of a host address in the part's region.
func (p part) gpa(hva uintptr) GPA { return p.region.Start + GPA(hva-uintptr(p.region.HVA)) }
