package doctor

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"ditto.vm/memory"
	"ditto.vm/vmm/kvm"
)

// manualDirtyLog is what the tracker kvm-log needs of
// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: manual protection, and bitmaps that start
// set (KVM API 7.18).
const manualDirtyLog = 3

// checkTracking finds out how written pages can be known, and which of the ways
// a machine takes that is not told which.
func (h *Host) checkTracking(r *report) {
	chosen := memory.TrackerNone
	if h.checkDirtyLog(r) {
		chosen = memory.TrackerKVMLog
	}
	if h.WPAsync != nil {
		err := h.WPAsync()
		if err == nil {
			chosen = memory.TrackerWPAsync
			r.add(OK, chosen.String(), "finds "+chosen.Sees(), "")
		} else {
			r.add(Warn, memory.TrackerWPAsync.String(), err.Error(), wpAsyncCure(err))
		}
	}
	switch chosen {
	case memory.TrackerWPAsync:
		r.add(OK, "auto", "takes wp-async", "")
	case memory.TrackerKVMLog:
		r.add(Warn, "auto", "takes kvm-log, which breaks the large pages of what the guest writes", "make wp-async work, as said there")
	default:
		r.add(Warn, "auto", "takes none: names of pages are proven by reading them", "make wp-async or kvm-log work, as said there")
	}
	switch {
	case h.UID == 0:
		r.add(OK, "faults of KVM", "root may handle them", "")
	case h.writable("dev/userfaultfd"):
		r.add(OK, "faults of KVM", "/dev/userfaultfd may be used", "")
	case h.read("proc/sys/vm/unprivileged_userfaultfd") == "1":
		r.add(OK, "faults of KVM", "vm.unprivileged_userfaultfd is 1", "")
	default:
		r.add(Warn, "faults of KVM", "this user may not handle them: no lazy restore of scattered pages, no post-copy", "chgrp kvm /dev/userfaultfd; chmod 660 /dev/userfaultfd")
	}
}

// wpAsyncCure is what to do about a wp-async that does not work.
func wpAsyncCure(err error) string {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return "allow the system call userfaultfd, for example in the container's seccomp profile"
	case errors.Is(err, unix.ENOSYS):
		return "use a kernel with CONFIG_USERFAULTFD, Linux 6.7 or newer"
	}
	return "use Linux 6.7 or newer"
}

// checkDirtyLog asks for KVM's own ways to log writes, and reports whether
// kvm-log works.
func (h *Host) checkDirtyLog(r *report) (kvmLog bool) {
	if h.KVM == nil {
		return false
	}
	system, err := h.KVM()
	if err != nil {
		return false // said already
	}
	defer system.Close()
	const log, ring = memory.TrackerKVMLog, memory.TrackerKVMRing
	if kvmLog = system.CheckExtension(kvm.CapManualDirtyLog2)&manualDirtyLog == manualDirtyLog; kvmLog {
		r.add(OK, log.String(), "finds "+log.Sees(), "")
	} else {
		r.add(Warn, log.String(), "KVM's dirty bitmap lacks manual protection", "use Linux 5.7 or newer")
	}
	if size := max(system.CheckExtension(kvm.CapDirtyLogRingAcqRel), system.CheckExtension(kvm.CapDirtyLogRing)); size > 0 {
		r.add(OK, ring.String(), fmt.Sprintf("finds %s, in rings of up to %d bytes", ring.Sees(), size), "")
	} else {
		r.add(Warn, ring.String(), "KVM has no dirty rings", "use Linux 5.11 or newer")
	}
	return kvmLog
}
