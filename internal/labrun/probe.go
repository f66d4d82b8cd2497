package labrun

import "ditto.vm/vmm/kvm"

// LinuxRuns tells whether this machine's own KVM runs Linux, so that no
// emulated host is needed, and if not why.
func LinuxRuns() (ok bool, reason string) {
	system, err := kvm.Open()
	if err != nil {
		return false, err.Error()
	}
	defer func() { _ = system.Close() }()
	linux, err := system.ProbeLinux()
	if err != nil {
		return false, err.Error()
	}
	return linux.OK, linux.Reason
}
