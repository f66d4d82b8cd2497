package vmm

import (
	"errors"
	"fmt"
	"strings"

	"ditto.vm/memory"
	"ditto.vm/migration/state"
	"ditto.vm/vmm/config"
)

// ErrOtherMachine is wrapped when a state belongs to a machine that is made in
// another way than the configuration says.
var ErrOtherMachine = errors.New("the state is of another machine")

// guestFacts lists what the guest can see of a configuration and cannot get used
// to while it runs, one fact a line. The sections of devices tell the rest.
func guestFacts(cfg *config.Config) []string {
	platform := "platform acpi"
	if strings.HasPrefix(cfg.Kernel, PayloadPrefix) {
		platform = "platform payload"
	}
	facts := []string{platform}
	for i, d := range cfg.Disks {
		facts = append(facts, fmt.Sprintf("blk%d queues=%d readonly=%v serial=%q", i, d.QueueCount(cfg.CPUs), d.ReadOnly, d.Serial))
	}
	for i, n := range presentNets(cfg) {
		facts = append(facts, fmt.Sprintf("net%d mtu=%d", i, n.MTU))
	}
	if cfg.RNG {
		facts = append(facts, "rng0")
	}
	if b := cfg.Balloon; b.Enabled {
		facts = append(facts, fmt.Sprintf("balloon0 deflate-on-oom=%v free-page-reporting=%v", b.DeflateOnOOM, b.FreePageReporting))
	}
	if cfg.Console == config.ConsoleVirtio {
		facts = append(facts, "console0")
	}
	return facts
}

// presentNets are the networks that become devices.
func presentNets(cfg *config.Config) []*config.Net {
	var nets []*config.Net
	for i := range cfg.Nets {
		if cfg.Nets[i].Mode != config.NetNone {
			nets = append(nets, &cfg.Nets[i])
		}
	}
	return nets
}

// machineMessage writes the section "machine" down.
func machineMessage(cfg *config.Config, ram []memory.Range, version string) *state.Machine {
	x := &state.Machine{Version: version, Vcpus: uint32(cfg.CPUs), Facts: guestFacts(cfg)}
	for _, r := range ram {
		x.Ram = append(x.Ram, &state.MemoryRange{Start: uint64(r.Start), Size: r.Size})
	}
	return x
}

// checkMachine refuses a state that was not saved from a machine as cfg makes it.
func checkMachine(x *state.Machine, cfg *config.Config) error {
	ram, err := memory.Layout(uint64(cfg.Memory.Size))
	if err != nil {
		return err
	}
	if int64(x.GetVcpus()) != int64(cfg.CPUs) {
		return fmt.Errorf("%w: it has %d vCPUs, and this one %d", ErrOtherMachine, x.GetVcpus(), cfg.CPUs)
	}
	if !sameRAM(x.GetRam(), ram) {
		return fmt.Errorf("%w: it has %d bytes of memory in %d ranges, and this one %d in %d",
			ErrOtherMachine, sizeOf(x.GetRam()), len(x.GetRam()), cfg.Memory.Size, len(ram))
	}
	facts, theirs := guestFacts(cfg), x.GetFacts()
	for i := range max(len(facts), len(theirs)) {
		here, there := factAt(facts, i), factAt(theirs, i)
		if here != there {
			return fmt.Errorf("%w: it has %q where this one has %q", ErrOtherMachine, there, here)
		}
	}
	return nil
}

// factAt is a fact, or that there is none.
func factAt(facts []string, i int) string {
	if i < len(facts) {
		return facts[i]
	}
	return "nothing"
}

func sameRAM(there []*state.MemoryRange, here []memory.Range) bool {
	if len(there) != len(here) {
		return false
	}
	for i, r := range here {
		if there[i].GetStart() != uint64(r.Start) || there[i].GetSize() != r.Size {
			return false
		}
	}
	return true
}

func sizeOf(ram []*state.MemoryRange) (n uint64) {
	for _, r := range ram {
		n += r.GetSize()
	}
	return n
}
