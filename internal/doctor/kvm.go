package doctor

import (
	"errors"
	"fmt"
	"runtime"
	"strings"

	"ditto.vm/vmm"
	"ditto.vm/vmm/kvm"
)

// KVM is an open /dev/kvm, as far as this package asks it.
type KVM interface {
	CheckExtension(kvm.Capability) int
	ProbeLinux() (kvm.Linux, error)
	Close() error
}

// checkHost names the host.
func (h *Host) checkHost(r *report) {
	r.add(OK, "kernel", h.read("proc/sys/kernel/osrelease"), "")
	cpu := h.field("proc/cpuinfo", "model name")
	if cpu == "" {
		cpu = "unknown"
	}
	r.add(OK, "cpu", fmt.Sprintf("%d of %s", runtime.NumCPU(), cpu), "")
	if strings.Contains(" "+h.field("proc/cpuinfo", "flags")+" ", " hypervisor ") {
		r.add(OK, "nesting", "this host is a virtual machine itself", "")
	}
}

// checkKVM finds out what kind of KVM there is and whether Linux runs on it.
func (h *Host) checkKVM(r *report) {
	kind, paging := h.kvmKind()
	if h.KVM == nil {
		return
	}
	system, err := h.KVM()
	if err != nil {
		r.Err = err
		cure := "see the message"
		switch {
		case errors.Is(err, kvm.ErrPermission):
			cure = "sudo usermod -aG kvm $USER, then log in again"
		case errors.Is(err, kvm.ErrNoDevice):
			cure = h.kvmCure()
		}
		r.add(Missing, "device", err.Error(), cure)
		return
	}
	defer system.Close()
	r.add(OK, "device", "/dev/kvm can be used", "")
	r.add(OK, "kind", kind, "")
	h.checkLinux(r, system)
	r.Findings = append(r.Findings, paging)
	r.add(OK, "vcpus", fmt.Sprintf("%d recommended, %d at most", system.CheckExtension(kvm.CapNRVCPUs), system.CheckExtension(kvm.CapMaxVCPUs)), "")
	h.checkCapability(r, system, "statistics", kvm.CapBinaryStatsFD, "how KVM maps memory cannot be seen: use Linux 5.14 or newer")
	h.checkCapability(r, system, "prefault", kvm.CapPreFaultMemory, "guests fault their memory in one page at a time: use Linux 6.11 or newer with two-dimensional paging")
}

func (h *Host) checkLinux(r *report, system KVM) {
	linux, err := system.ProbeLinux()
	switch {
	case err != nil:
		r.Err = err
		r.add(Missing, "linux", err.Error(), "see the kernel's log")
	case !linux.OK:
		r.Err = fmt.Errorf("%w: %s", vmm.ErrNoLinux, linux.Reason)
		r.add(Missing, "linux", linux.Reason, "use a host with VT-x or AMD-V, or switch nested virtualization on in the hypervisor below; payload guests run here")
	default:
		r.add(OK, "linux", "unmodified kernels run", "")
	}
}

func (h *Host) checkCapability(r *report, system KVM, name string, capability kvm.Capability, cure string) {
	if system.CheckExtension(capability) > 0 {
		r.add(OK, name, "yes", "")
		return
	}
	r.add(Warn, name, "no", cure)
}

// kvmKind tells the implementation of KVM, and how it maps guest memory.
func (h *Host) kvmKind() (kind string, paging Finding) {
	paging = Finding{Area: "kvm", Name: "nested paging"}
	module, parameter, name := "", "", ""
	switch {
	case h.exists("sys/module/kvm_pvm"):
		paging.Status, paging.Value = Warn, "no: shadow paging in software"
		paging.Cure = "use a host with VT-x or AMD-V where speed matters"
		return "PVM (software, kvm_pvm)", paging
	case h.exists("sys/module/kvm_amd"):
		module, parameter, name = "kvm_amd", "npt", "AMD-V (kvm_amd)"
	case h.exists("sys/module/kvm_intel"):
		module, parameter, name = "kvm_intel", "ept", "VT-x (kvm_intel)"
	default:
		paging.Status, paging.Value = Warn, "unknown"
		paging.Cure = "this KVM has no module that tells"
		return "unknown", paging
	}
	switch value := h.read("sys/module/" + module + "/parameters/" + parameter); value {
	case "Y", "1":
		paging.Status, paging.Value = OK, "yes, "+strings.ToUpper(parameter)
	default:
		paging.Status, paging.Value = Warn, "no: shadow paging"
		paging.Cure = fmt.Sprintf("reload the module with %s=1, if the CPU has it", parameter)
	}
	return name, paging
}

// kvmCure is what to do about a missing /dev/kvm.
func (h *Host) kvmCure() string {
	flags := " " + h.field("proc/cpuinfo", "flags") + " "
	switch {
	case strings.Contains(flags, " vmx "):
		return "modprobe kvm_intel; in a container, pass /dev/kvm into it"
	case strings.Contains(flags, " svm "):
		return "modprobe kvm_amd; in a container, pass /dev/kvm into it"
	}
	return "switch virtualization on in the firmware, or nested virtualization in the hypervisor below"
}
