package memory

// WriteObserver hears of every write that the VMM itself makes to guest
// memory. KVM's dirty log and dirty ring do not see those writes, so a tracker
// built on them is complete only together with an observer (KVM API 4.8).
type WriteObserver interface {
	// HostWrite is called after bytes [gpa, gpa+n) changed and before the
	// guest is told of it. It may be called from any thread, must not block
	// and must not write guest memory itself.
	HostWrite(gpa GPA, n uint64)
}
