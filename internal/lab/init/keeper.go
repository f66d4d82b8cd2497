package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Requests of the KVM API, which take no structure.
const (
	kvmCreateVM      = 0xae01
	kvmCreateVCPU    = 0xae41
	kvmCreateIRQChip = 0xae60
)

// keepVM makes a virtual machine that never runs, and keeps it. With the first
// and the last machine of a host the kernel patches its scheduler (the jump
// label of the preemption notifiers), and with each first and last CPU whose
// APIC is off it patches KVM. QEMU's TCG may miss such a patch when it runs
// several CPUs: one of them goes on with the old translation, and then the host
// dies in the patch's breakpoint, or a guest loses its registers. With this
// machine there is always one more.
func keepVM() error {
	kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("keep a VM: %w", &os.PathError{Op: "open", Path: "/dev/kvm", Err: err})
	}
	vm, err := unix.IoctlRetInt(kvm, kvmCreateVM)
	if err != nil {
		return fmt.Errorf("keep a VM: create: %w", err)
	}
	if _, err := unix.IoctlRetInt(vm, kvmCreateIRQChip); err != nil {
		return fmt.Errorf("keep a VM: interrupt controllers: %w", err)
	}
	if _, err := unix.IoctlRetInt(vm, kvmCreateVCPU); err != nil {
		return fmt.Errorf("keep a VM: vCPU: %w", err)
	}
	return nil // the descriptors stay open as long as this process runs
}
