package vmm

import (
	"fmt"
	"os"
	"time"

	"ditto.vm/vmm/kvm"
)

// Info says what a VM is and how it is doing.
type Info struct {
	Name     string
	State    State
	PID      int
	CPUs     int
	Memory   uint64 // bytes
	Kernel   string // path, or payload:NAME
	Protocol string // boot protocol, empty before the start
	Cmdline  string
	Started  time.Time // zero before the start
	Restarts int
	Devices  []DeviceInfo
}

// DeviceInfo names a device on PCI.
type DeviceInfo struct {
	Slot   int
	Kind   string // virtio device type
	Detail string // a disk's path, a network's mode and address
}

// Info describes the VM.
func (m *VM) Info() Info {
	m.mu.Lock()
	defer m.mu.Unlock()
	info := Info{
		Name:     m.cfg.Name,
		State:    m.state,
		PID:      os.Getpid(),
		CPUs:     len(m.vcpus),
		Memory:   uint64(m.cfg.Memory.Size),
		Kernel:   m.cfg.Kernel,
		Cmdline:  m.source.cmdline,
		Started:  m.started,
		Restarts: m.resets,
		Devices:  m.pci.info,
	}
	if m.loaded != nil {
		info.Protocol = m.loaded.Protocol.String()
	}
	return info
}

// Stats are counters since the start, and gauges of the moment.
type Stats struct {
	// Exits counts the exits of all vCPUs by reason.
	Exits map[string]uint64
	// Unclaimed counts accesses to addresses where there is nothing.
	Unclaimed uint64
	// Pages4K, Pages2M and Pages1G are how many pages of each size KVM maps
	// now: the truth about large frames, from KVM_GET_STATS_FD.
	Pages4K, Pages2M, Pages1G uint64
	// Memory is RSS and its parts, of the whole process.
	Memory ProcessMemory
}

// Stats reads the counters.
func (m *VM) Stats() (Stats, error) {
	s := Stats{Exits: map[string]uint64{}, Unclaimed: m.unclaimed.Load()}
	for _, c := range m.vcpus {
		for reason := range c.counts {
			if n := c.counts[reason].Load(); n > 0 {
				s.Exits[kvm.ExitReason(reason).String()] += n
			}
		}
	}
	m.mu.Lock()
	closed := m.state == StateStopped
	m.mu.Unlock()
	if m.stats != nil && !closed {
		values, err := m.stats.Read()
		if err != nil {
			return Stats{}, err
		}
		s.Pages4K, s.Pages2M, s.Pages1G = values["pages_4k"], values["pages_2m"], values["pages_1g"]
	}
	var err error
	if s.Memory, err = m.processMemory(); err != nil {
		return Stats{}, fmt.Errorf("memory of the process: %w", err)
	}
	return s, nil
}
