package vmm

import (
	"fmt"

	"ditto.vm/memory"
	"ditto.vm/vmm/kvm"
)

// handleExit implements [exitHandler].
func (m *VM) handleExit(c *vcpu) error {
	switch reason := c.kvm.ExitReason(); reason {
	case kvm.ExitIO:
		m.portAccess(c.kvm.IO())
		return nil
	case kvm.ExitMMIO:
		return m.mmioAccess(c.kvm.MMIO())
	case kvm.ExitInterrupted, kvm.ExitIRQWindowOpen, kvm.ExitSetTPR, kvm.ExitTPRAccess, kvm.ExitIOAPICEOI, kvm.ExitBusLock, kvm.ExitHLT:
		return nil
	case kvm.ExitDirtyRingFull:
		return m.ringFull()
	case kvm.ExitShutdown:
		// A triple fault: the last resort of a kernel that wants a reset.
		m.log.Warn("triple fault, restarting the guest", "vcpu", c.id, "registers", c.registers())
		c.paused = true
		m.request(requestReset)
		return nil
	case kvm.ExitSystemEvent:
		return m.systemEvent(c.kvm.SystemEvent())
	case kvm.ExitInternalError:
		suberror, data := c.kvm.InternalError()
		return fmt.Errorf("KVM internal error %d, data %#x: %s", suberror, data, c.registers())
	case kvm.ExitFailEntry:
		return fmt.Errorf("the CPU refused to enter the guest, reason %#x: %s", c.kvm.FailEntry(), c.registers())
	case kvm.ExitMemoryFault:
		flags, gpa, size := c.kvm.MemoryFault()
		return fmt.Errorf("memory fault at %#x, %d bytes, flags %#x: %s", gpa, size, flags, c.registers())
	default:
		return fmt.Errorf("exit %q is not handled: %s", reason, c.registers())
	}
}

// KVM_SYSTEM_EVENT types (KVM API 5).
const (
	systemEventShutdown = 1
	systemEventReset    = 2
	systemEventCrash    = 3
)

func (m *VM) systemEvent(event uint32) error {
	switch event {
	case systemEventShutdown:
		m.request(requestPowerOff)
	case systemEventReset:
		m.request(requestReset)
	case systemEventCrash:
		m.request(requestPanicked)
	default:
		return fmt.Errorf("system event %d is not handled", event)
	}
	return nil
}

// portAccess serves IN and OUT, each item of a string instruction in turn. A
// port that nobody answers reads as ones.
func (m *VM) portAccess(io kvm.IOExit) {
	for d := io.Data; len(d) >= io.Size && io.Size > 0; d = d[io.Size:] {
		item := d[:io.Size]
		var known bool
		if io.Out {
			known = m.ports.Write(uint64(io.Port), item)
		} else if known = m.ports.Read(uint64(io.Port), item); !known {
			fillOnes(item)
		}
		if !known {
			m.unclaimed.Add(1)
		}
	}
}

// mmioAccess serves an access outside every memslot.
func (m *VM) mmioAccess(a kvm.MMIOExit) error {
	if m.mem.Contains(memory.GPA(a.GPA), uint64(len(a.Data))) {
		return fmt.Errorf("MMIO exit at %#x, which is guest RAM", a.GPA)
	}
	var known bool
	if a.Write {
		known = m.mmio.Write(a.GPA, a.Data)
	} else if known = m.mmio.Read(a.GPA, a.Data); !known {
		fillOnes(a.Data)
	}
	if !known {
		m.unclaimed.Add(1)
	}
	return nil
}

func fillOnes(p []byte) {
	for i := range p {
		p[i] = 0xff
	}
}
