package vmm

import (
	"fmt"
	"os"
	"time"

	"ditto.vm/vmm/api"
	"ditto.vm/vmm/kvm"
)

// Info describes the VM. The console log and the version are the process's to
// fill in.
func (m *VM) Info() api.Info {
	m.mu.Lock()
	defer m.mu.Unlock()
	info := api.Info{
		Name:        m.cfg.Name,
		State:       m.state,
		PID:         os.Getpid(),
		CPUs:        len(m.vcpus),
		MemoryBytes: uint64(m.cfg.Memory.Size),
		Kernel:      m.cfg.Kernel,
		CommandLine: m.source.cmdline,
		Started:     m.started,
		Devices:     []api.Device{},
	}
	if !m.started.IsZero() {
		info.UptimeMs = time.Since(m.started).Milliseconds()
	}
	for _, d := range m.pci.devices {
		info.Devices = append(info.Devices, d.info)
	}
	return info
}

// Stats reads the counters since the start and the gauges of the moment. The
// page counts are KVM's own (KVM_GET_STATS_FD): the truth about large frames.
func (m *VM) Stats() (api.Stats, error) {
	s := api.Stats{
		Exits: map[string]uint64{}, Devices: []api.DeviceStats{},
		Tracker: m.tracker.Kind().String(),
		Frames:  api.MemoryFrames{Reasons: map[string]uint64{}}, Names: api.MemoryNames{Counters: map[string]uint64{}},
	}
	for _, c := range m.vcpus {
		for reason := range c.counts {
			if n := c.counts[reason].Load(); n > 0 {
				s.Exits[kvm.ExitReason(reason).String()] += n
			}
		}
	}
	if n := m.unclaimed.Load(); n > 0 {
		s.Exits["unclaimed"] = n
	}
	if m.restored != nil {
		s.Restore = m.restored.stats()
	}
	// Closing waits for this lock, so nothing read below goes away meanwhile.
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.started.IsZero() {
		s.UptimeMs = time.Since(m.started).Milliseconds()
	}
	for _, d := range m.pci.devices {
		counters := map[string]uint64{"protocol_errors": d.NeedsResets()}
		if d.counters != nil {
			d.counters(counters)
		}
		s.Devices = append(s.Devices, api.DeviceStats{Name: d.info.Name, Kind: d.info.Kind, Counters: counters})
	}
	if m.closed {
		return s, nil
	}
	if m.stats != nil {
		values, err := m.stats.Read()
		if err != nil {
			return api.Stats{}, err
		}
		s.Pages4K, s.Pages2M, s.Pages1G = values["pages_4k"], values["pages_2m"], values["pages_1g"]
	}
	process, err := m.processMemory()
	if err != nil {
		return api.Stats{}, fmt.Errorf("memory of the process: %w", err)
	}
	s.Names = m.nameCounters()
	if err := m.refreshFrames(); err != nil {
		return api.Stats{}, err
	}
	if m.frames != nil {
		s.Frames = frameCensus(m.frames.Census())
	}
	s.GuestResidentBytes, s.GuestPSSBytes, s.GuestCopiedBytes = process.GuestRAM, process.GuestPSS, process.GuestCopied
	s.AnonymousBytes = process.Anonymous
	s.ResidentBytes = process.GuestRAM + process.Anonymous + process.Other
	return s, nil
}
