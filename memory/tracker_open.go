package memory

import (
	"errors"
	"fmt"
)

// TrackerHost is what a VM offers to trackers. Fields may be nil or empty.
type TrackerHost struct {
	Log   DirtyLog    // the VM, unless rings are enabled
	Ring  RingLog     // the VM, when rings are enabled
	Rings []DirtyRing // one a vCPU
}

// OpenTracker makes the tracker of the given kind, or of the kind that suits
// best for TrackerAuto: wp-async where it can be had, since it sees the VMM's
// writes and leaves quiet frames large, else KVM's log, else none. It installs
// the tracker as the Space's observer.
//
// The second result says, for TrackerAuto, why better kinds were passed over:
// errors that wrap [ErrUnsupported], for the log and the doctor. Asked for one
// kind, OpenTracker returns that kind or such an error.
func OpenTracker(s *Space, kind TrackerKind, host TrackerHost) (Tracker, []error, error) {
	if kind != TrackerAuto {
		t, err := openTracker(s, kind, host)
		if err != nil {
			return nil, nil, err
		}
		s.SetObserver(t)
		return t, nil, nil
	}
	var passed []error
	candidates := []TrackerKind{TrackerWPAsync, TrackerKVMRing, TrackerKVMLog, TrackerNone}
	for _, k := range candidates {
		t, err := openTracker(s, k, host)
		switch {
		case err == nil:
			s.SetObserver(t)
			return t, passed, nil
		case !errors.Is(err, ErrUnsupported):
			return nil, passed, err
		}
		passed = append(passed, err)
	}
	return nil, passed, fmt.Errorf("no tracker: %w", errors.Join(passed...))
}

func openTracker(s *Space, kind TrackerKind, host TrackerHost) (Tracker, error) {
	switch kind {
	case TrackerWPAsync:
		t, err := openWPAsync(s)
		if err != nil {
			return nil, err
		}
		return t, nil
	case TrackerKVMLog:
		t, err := openKVMLog(s, host.Log)
		if err != nil {
			return nil, err
		}
		return t, nil
	case TrackerKVMRing:
		if host.Ring == nil || len(host.Rings) == 0 {
			return nil, &TrackerError{Kind: kind, Reason: "dirty rings were not enabled before the first vCPU, or KVM lacks them"}
		}
		return openKVMRing(s, host.Ring, host.Rings), nil
	case TrackerNone:
		return noTracker{s}, nil
	}
	return nil, fmt.Errorf("tracker %s: not a kind of tracker", kind)
}

// ProbeTrackers says for each kind whether this host can carry it: nil, or why
// not. KVM's are probed through host, and wp-async on a throw-away Space.
func ProbeTrackers(host TrackerHost) (map[TrackerKind]error, error) {
	s, err := New(Config{Size: LargeFrameSize})
	if err != nil {
		return nil, fmt.Errorf("probe trackers: %w", err)
	}
	defer s.Close()
	found := make(map[TrackerKind]error)
	for _, k := range []TrackerKind{TrackerWPAsync, TrackerKVMLog, TrackerKVMRing, TrackerNone} {
		t, err := openTracker(s, k, host)
		if err == nil && k == TrackerWPAsync {
			err = probeWPAsync(s, t)
		}
		if t != nil {
			err = errors.Join(err, t.Close())
		}
		found[k] = err
	}
	return found, nil
}

// probeWPAsync checks that a write to an armed page is seen and a read is not.
func probeWPAsync(s *Space, t Tracker) error {
	all := s.regions[0].Range
	s.regions[0].mem[0], s.regions[0].mem[PageSize] = 1, 1
	if err := t.Arm(all); err != nil {
		return err
	}
	s.regions[0].mem[0]++
	got := s.NewPageSet()
	if err := t.Collect(all, got, Rearm); err != nil {
		return err
	}
	if !got.Has(0) || got.Has(PageSize) {
		return &TrackerError{Kind: TrackerWPAsync, Reason: "the kernel offers it but does not report writes rightly"}
	}
	return nil
}
