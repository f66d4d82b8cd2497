package kvm

import (
	"errors"
	"fmt"
	"io/fs"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// DevicePath is the KVM device node.
const DevicePath = "/dev/kvm"

// apiVersion is the only version there will ever be (KVM API 4.1).
const apiVersion = 12

// Sentinel errors of [Open]; a caller tells the user what to do about each.
var (
	// ErrNoDevice: there is no /dev/kvm.
	ErrNoDevice = errors.New("no /dev/kvm")
	// ErrPermission: /dev/kvm may not be opened by this user.
	ErrPermission = errors.New("no permission on /dev/kvm")
)

// System is an open /dev/kvm.
type System struct{ fd int }

// Open opens /dev/kvm and checks the API version. Errors wrap [ErrNoDevice] or
// [ErrPermission] where they apply.
func Open() (*System, error) {
	fd, err := unix.Open(DevicePath, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return nil, fmt.Errorf("%w (%w): load kvm_intel or kvm_amd, or enable virtualization in the firmware", ErrNoDevice, err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%w (%w): add your user to the kvm group", ErrPermission, err)
	case err != nil:
		return nil, fmt.Errorf("open %s: %w", DevicePath, err)
	}
	s := &System{fd: fd}
	version, err := gokvm.GetAPIVersion(uintptr(fd))
	if err == nil && version != apiVersion {
		err = fmt.Errorf("KVM API version %d, need %d", version, apiVersion)
	}
	if err != nil {
		_ = s.Close()
		return nil, fmt.Errorf("%s is not a KVM that can be used (KVM_GET_API_VERSION: %w): see ls -l %[1]s", DevicePath, err)
	}
	return s, nil
}

// Close closes /dev/kvm. Virtual machines made from it live on.
func (s *System) Close() error { return unix.Close(s.fd) }

// FD returns the file descriptor.
func (s *System) FD() int { return s.fd }

// CheckExtension returns the value of a capability, 0 when absent (KVM API 4.4).
func (s *System) CheckExtension(c Capability) int { return checkExtension(s.fd, c) }

func checkExtension(fd int, c Capability) int {
	v, err := gokvm.CheckExtension(uintptr(fd), gokvm.Capability(c))
	if err != nil {
		return 0
	}
	return int(v)
}

// CreateVM makes an empty virtual machine (KVM API 4.2).
func (s *System) CreateVM() (*VM, error) {
	for {
		fd, err := gokvm.CreateVM(uintptr(s.fd))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, opError("KVM_CREATE_VM", err)
		}
		size, err := gokvm.GetVCPUMMmapSize(uintptr(s.fd))
		if err != nil {
			_ = unix.Close(int(fd))
			return nil, opError("KVM_GET_VCPU_MMAP_SIZE", err)
		}
		return &VM{fd: int(fd), runSize: int(size)}, nil
	}
}

// Capability is a KVM_CAP number.
type Capability int

// Capabilities that ditto asks for (include/uapi/linux/kvm.h).
const (
	CapIRQChip              Capability = 0
	CapUserMemory           Capability = 3
	CapNRVCPUs              Capability = 9
	CapNRMemslots           Capability = 10
	CapMPState              Capability = 14
	CapSyncMMU              Capability = 16
	CapIRQRouting           Capability = 25
	CapIRQFD                Capability = 32
	CapPIT2                 Capability = 33
	CapIOEventFD            Capability = 36
	CapAdjustClock          Capability = 39
	CapXSAVE                Capability = 55
	CapTSCControl           Capability = 60
	CapMaxVCPUs             Capability = 66
	CapTSCDeadlineTimer     Capability = 72
	CapReadonlyMem          Capability = 81
	CapImmediateExit        Capability = 136
	CapX2APICAPI            Capability = 129
	CapSyncRegs             Capability = 74
	CapManualDirtyLog2      Capability = 168
	CapDirtyLogRing         Capability = 192
	CapBinaryStatsFD        Capability = 203
	CapXSAVE2               Capability = 208
	CapDirtyLogRingAcqRel   Capability = 223
	CapMemoryFaultInfo      Capability = 232
	CapPreFaultMemory       Capability = 236
	CapX86DisableExits      Capability = 143
	CapNestedState          Capability = 157
	CapExceptionPayload     Capability = 164
	CapMSRFilter            Capability = 189
	CapGetTSCKHz            Capability = 61
	CapKVMClockCtrl         Capability = 76
	CapCoalescedMMIO        Capability = 15
	CapIOEventFDAnyLength   Capability = 122
	CapVMMoveEncContextFrom Capability = 206
)
