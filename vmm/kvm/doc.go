// Package kvm is the /dev/kvm interface: one method per ioctl on a typed
// receiver, Go values in and out, nothing else. Policy lives in package vmm.
//
//	System  /dev/kvm             capabilities, supported CPUID, CreateVM
//	VM      anon fd              memslots, irqchip, routing, clock, CreateVCPU
//	VCPU    anon fd + kvm_run    registers, MSRs, LAPIC, Run
//	Stats   anon fd              the counters of KVM_GET_STATS_FD
//
// Where github.com/bobuhiro11/gokvm/kvm has the call and gets it right it is
// used; the rest are typed here over its ioctl-number helpers. KVM_RUN is ours,
// because EINTR must reach the caller.
//
// All file descriptors work only in the process that created the VM. A VCPU's
// methods belong to the thread that runs it, except [VCPU.SetImmediateExit].
//
// References are to Documentation/virt/kvm/api.rst ("KVM API") of Linux 6.12.
package kvm
