package kvm

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// Flags of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (KVM API 7.18).
const (
	dirtyLogManualProtect = 1 << 0
	dirtyLogInitiallySet  = 1 << 1
)

// EnableManualDirtyLog makes KVM_GET_DIRTY_LOG only read, leaves clearing and
// write-protecting to [VM.ClearDirtyLog], and starts every bitmap with all pages
// dirty, so that switching logging on costs nothing (KVM API 7.18).
func (v *VM) EnableManualDirtyLog() error {
	const want = dirtyLogManualProtect | dirtyLogInitiallySet
	if v.CheckExtension(CapManualDirtyLog2)&want != want {
		return &OpError{Op: "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", Err: unix.EOPNOTSUPP}
	}
	return v.EnableCap(CapManualDirtyLog2, want)
}

// LogDirtyPages switches the dirty log of an existing memslot on or off. The
// rest of the arguments are the slot's own and must not differ (KVM API 4.35).
func (v *VM) LogDirtyPages(slot uint32, gpa, size, hva uint64, on bool) error {
	m := Memslot{Slot: slot, GPA: gpa, Size: size, HVA: hva}
	if on {
		m.Flags = MemslotLogDirtyPages
	}
	return v.SetMemslot(m)
}

// dirtyLog mirrors struct kvm_dirty_log.
type dirtyLog struct {
	Slot   uint32
	_      uint32
	Bitmap unsafe.Pointer
}

// DirtyLog reads the bitmap of a memslot: one bit a page, for all its pages, in
// words of 64 (KVM API 4.8).
func (v *VM) DirtyLog(slot uint32, bitmap []uint64) error {
	if len(bitmap) == 0 {
		return &OpError{Op: "KVM_GET_DIRTY_LOG", Err: unix.EINVAL}
	}
	l := dirtyLog{Slot: slot, Bitmap: unsafe.Pointer(&bitmap[0])}
	return set("KVM_GET_DIRTY_LOG", v.fd, nrGetDirtyLog, &l)
}

// clearDirtyLog mirrors struct kvm_clear_dirty_log.
type clearDirtyLog struct {
	Slot      uint32
	NumPages  uint32
	FirstPage uint64
	Bitmap    unsafe.Pointer
}

// ClearDirtyLog clears and write-protects the pages whose bit is set, among
// nPages from firstPage, to which the first bit belongs. firstPage is a multiple
// of 64, and so is nPages unless the range reaches the slot's end (KVM API
// 4.117).
func (v *VM) ClearDirtyLog(slot uint32, firstPage uint64, nPages uint32, bitmap []uint64) error {
	if uint64(len(bitmap))*64 < uint64(nPages) || len(bitmap) == 0 {
		return &OpError{Op: "KVM_CLEAR_DIRTY_LOG", Err: unix.EINVAL}
	}
	c := clearDirtyLog{Slot: slot, NumPages: nPages, FirstPage: firstPage, Bitmap: unsafe.Pointer(&bitmap[0])}
	_, err := ioctlPtr("KVM_CLEAR_DIRTY_LOG", v.fd, iowr[clearDirtyLog](nrClearDirtyLog), unsafe.Pointer(&c))
	return err
}

// Dirty rings (KVM API 8.29).
const (
	dirtyRingPageOffset = 64 // KVM_DIRTY_LOG_PAGE_OFFSET, in pages
	dirtyGFNDirty       = 1 << 0
	dirtyGFNReset       = 1 << 1
)

// dirtyGFN mirrors struct kvm_dirty_gfn.
type dirtyGFN struct {
	Flags  uint32 // shared with the kernel
	Slot   uint32 // address space in the upper 16 bits
	Offset uint64 // page in the slot
}

// EnableDirtyRings gives every vCPU that is made from now on a ring of entries
// pages, a power of two. The bitmap calls fail from then on (KVM API 8.29).
func (v *VM) EnableDirtyRings(entries uint32) error {
	var size = uint64(entries) * uint64(unsafe.Sizeof(dirtyGFN{}))
	for _, c := range []Capability{CapDirtyLogRingAcqRel, CapDirtyLogRing} {
		if most := v.CheckExtension(c); most > 0 {
			if size > uint64(most) {
				return fmt.Errorf("dirty ring of %d entries: KVM allows %d: %w", entries, most/int(unsafe.Sizeof(dirtyGFN{})), unix.E2BIG)
			}
			return v.EnableCap(c, size)
		}
	}
	return &OpError{Op: "KVM_CAP_DIRTY_LOG_RING", Err: unix.EOPNOTSUPP}
}

// ResetDirtyRings write-protects again what was harvested from all rings and
// returns how many entries that were (KVM API 8.29). A call that a signal cuts
// short leaves pages unprotected that it counts (Linux 6.16 and newer), so signals
// wait until it is over; other work for the thread can still cut it short.
func (v *VM) ResetDirtyRings() (n int, err error) {
	err = withoutSignals(func() error {
		n, err = ioctl("KVM_RESET_DIRTY_RINGS", v.fd, gokvm.IIO(nrResetDirtyRings), 0)
		return err
	})
	return n, err
}

// DirtyRing is the mapped dirty ring of one vCPU. One goroutine at a time may
// harvest it; the vCPU may run meanwhile.
type DirtyRing struct {
	mapping []byte
	entries []dirtyGFN
	next    uint32 // free-running index of the next entry to harvest
}

// DirtyRing maps the vCPU's ring, whose size [VM.EnableDirtyRings] set.
func (c *VCPU) DirtyRing(entries uint32) (*DirtyRing, error) {
	size := int(entries) * int(unsafe.Sizeof(dirtyGFN{}))
	m, err := unix.Mmap(c.fd, dirtyRingPageOffset*int64(unix.Getpagesize()), size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the dirty ring: %w", err)
	}
	// SAFETY: the kernel's mapping holds that many entries, page-aligned, and
	// lives until Close.
	return &DirtyRing{mapping: m, entries: unsafe.Slice((*dirtyGFN)(unsafe.Pointer(&m[0])), entries)}, nil
}

// Close unmaps the ring.
func (r *DirtyRing) Close() error {
	err := unix.Munmap(r.mapping)
	r.mapping, r.entries = nil, nil
	return err
}

// Harvest calls visit with slot and page of each entry that the vCPU has
// written, hands them back and returns their number. [VM.ResetDirtyRings] then
// frees the entries and protects the pages.
func (r *DirtyRing) Harvest(visit func(slot uint32, page uint64)) int {
	n := 0
	for ; n < len(r.entries); n++ {
		e := &r.entries[r.next%uint32(len(r.entries))]
		if atomic.LoadUint32(&e.Flags)&(dirtyGFNDirty|dirtyGFNReset) != dirtyGFNDirty {
			break
		}
		visit(e.Slot&0xffff, e.Offset)
		atomic.StoreUint32(&e.Flags, dirtyGFNReset)
		r.next++
	}
	return n
}
