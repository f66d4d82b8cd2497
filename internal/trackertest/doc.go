// Package trackertest checks trackers by brute force. A [Mirror] is a copy of
// guest memory that is kept up to date by a tracker alone, as the destination of
// a migration is: whatever the tracker omits stays different, and comparing all
// bytes finds it.
//
//	guest memory --- tracker.Collect ---> pages copied ---> Mirror
//	      |                                                   |
//	      +------------------ Check: equal? ------------------+
//
// A [Machine] is the guest of these checks, and of the benchmarks of trackers: a
// memory writer on a vCPU of its own. Tests that break and collapse frames under
// it compare ditto's book with smaps and with KVM.
package trackertest
