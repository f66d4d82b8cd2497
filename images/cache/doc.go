// Package cache says where ditto keeps what it can make again: fetched
// packages, unpacked kernels, built root file systems.
//
//	$DITTO_CACHE, or $XDG_CACHE_HOME/ditto, or ~/.cache/ditto
//	  apt/       private apt configuration, lists and archives (images/debian)
//	  debian/    unpacked packages, one folder each, never changed (images/debian)
//	  lab/       what the emulated host is made of (internal/lab)
//
// Everything below it may be deleted while no ditto process runs. Folders are
// made in a temporary place and renamed, under a lock that other processes
// respect, so that what exists is complete.
package cache
