// Package trackertest checks trackers by brute force. A [Mirror] is a copy of
// guest memory that is kept up to date by a tracker alone, as the destination of
// a migration is: whatever the tracker omits stays different, and comparing all
// bytes finds it.
//
//	guest memory --- tracker.Collect ---> pages copied ---> Mirror
//	      |                                                   |
//	      +------------------ Check: equal? ------------------+
package trackertest
