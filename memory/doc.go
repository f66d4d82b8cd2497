// Package memory owns guest-physical memory: where it lies, what backs it,
// who may touch it and who hears of writes.
//
//	GPA 0                 3 GiB          4 GiB                       top
//	 |------- low RAM -----|--- hole -----|--------- high RAM --------|
//	 |      region 0       | PCI, ECAM,   |         region 1          |
//	                         APICs
//
// A [Space] is made of one or two regions. Each region is one KVM memslot
// whose host-virtual and guest-physical addresses are congruent modulo the
// frame size (2 MiB, or 1 GiB when asked for), so that EPT/NPT can map a whole
// large frame with one entry.
//
// Ownership: the Space owns the host mapping until [Space.Close]. Callers hold
// slices returned by [Space.View] and [Space.Writable] only while they know the
// Space to be open; the VM closes it last, after every vCPU and device worker
// has been joined.
//
// Every write the VMM itself makes to guest memory is reported to the
// [WriteObserver], because KVM's dirty log sees only the guest's writes: either
// by writing with [Space.WriteAt], or by calling [Space.Wrote] after writing
// through a slice and before telling the guest.
//
// A [Tracker] is such an observer: it tells which pages were written since they
// were armed, by whomever. [OpenTracker] chooses one. [Frames] keeps how the
// host maps each large frame and why, and breaks and collapses them.
//
// After a restore parts of memory are private views of files ([Space.MapFiles]),
// and pages of the rest may still be elsewhere ([Missing]). Neither shows: host
// addresses stay, what is given back or emptied is zeros, and pages are fetched
// when they are touched, by KVM through userfaultfd and by Go code before
// [Space.View] returns.
//
// Kernel interfaces: userfaultfd(2) for missing pages and with
// UFFD_FEATURE_WP_ASYNC, PAGEMAP_SCAN
// (Documentation/admin-guide/mm/pagemap.rst), MADV_COLLAPSE (madvise(2)), KVM's
// dirty log and ring (KVM API 4.8, 7.18, 8.29).
package memory
