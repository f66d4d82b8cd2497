package vmm

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"ditto.vm/guest/payload"
	"ditto.vm/internal/labtest"
	"ditto.vm/memory"
	"ditto.vm/migration/state"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/kvm"
)

// copyOf fills memory with a copy of another guest's.
func copyOf(from *memory.Space) func(*memory.Space) error {
	return func(to *memory.Space) error {
		for _, r := range from.Regions() {
			var failed error
			err := from.Populated(r.Range, func(run memory.Range) {
				src, err := from.View(run.Start, run.Size)
				if err == nil {
					err = to.WriteAt(src, run.Start)
				}
				failed = errors.Join(failed, err)
			})
			if err = errors.Join(err, failed); err != nil {
				return err
			}
		}
		return nil
	}
}

// restoreOf makes a VM of a paused one, which it closes.
func restoreOf(t testing.TB, m *VM, c config.Config, opts RestoreOptions) *VM {
	t.Helper()
	sections, err := m.SaveState(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ram, err := memory.New(memory.Config{Size: m.mem.Size()})
	if err != nil {
		t.Fatal(err)
	}
	defer ram.Close()
	if err := copyOf(m.mem)(ram); err != nil {
		t.Fatal(err)
	}
	// The disks' locks are free only then.
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	opts.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	if opts.Console == nil {
		opts.Console = newConsole()
	}
	restored, err := Restore(t.Context(), c, sections, copyOf(ram), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := restored.Close(); err != nil {
			t.Error(err)
		}
	})
	return restored
}

// decoded are the messages of a state by section, without what goes on while a
// VM is paused: its clocks and the count of the local APIC's timer.
func decoded(t testing.TB, sections []state.Section) map[string]proto.Message {
	t.Helper()
	all := map[string]proto.Message{}
	for _, s := range sections {
		var m proto.Message
		switch s.Name {
		case "machine":
			m = &state.Machine{}
		case "cpu":
			m = &state.CPU{}
		case "irqchip":
			m = &state.IRQChip{}
		case "clock":
			m = &state.Clock{}
		case "platform":
			m = &state.Platform{}
		case "pci":
			m = &state.PCI{}
		default:
			m = &state.Virtio{}
		}
		if err := state.Decode(s, m); err != nil {
			t.Fatal(err)
		}
		switch x := m.(type) {
		case *state.CPU:
			for _, v := range x.Vcpus {
				stillTime(v)
			}
		case *state.Clock:
			x.Reset()
		case *state.Platform:
			x.PmTimer = 0
		case *state.IRQChip:
			// When each counter of the timer was loaded.
			for channel := range 3 {
				clear(x.Pit[channel*24+16 : channel*24+24])
			}
		}
		all[s.Name] = m
	}
	return all
}

// stillTime drops what counts by itself.
func stillTime(v *state.VCPU) {
	for i, index := range v.MsrIndices {
		if index == msrTSC || index == msrTSCDeadline {
			v.MsrValues[i] = 0
		}
	}
	const timerCount = 0x390
	clear(v.Lapic[timerCount : timerCount+4])
}

func saveOf(t testing.TB, m *VM) []state.Section {
	t.Helper()
	sections, err := m.SaveState(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return sections
}

// runUntil lets a guest run until its memory writer has written n pages more.
func runUntil(t testing.TB, m *VM, n uint64) {
	t.Helper()
	before, err := payload.ReadMemWriter(m.mem)
	if err != nil {
		before.Writes = 0 // not there before its first instruction
	}
	for {
		now, err := payload.ReadMemWriter(m.mem)
		if err == nil && now.Writes >= before.Writes+n {
			return
		}
		if t.Context().Err() != nil {
			t.Fatal("the guest does not write")
		}
		time.Sleep(100 * time.Microsecond)
	}
}

// TestRestoreGoesOn: a guest that is saved and restored again and again never
// finds a page that it did not write, and its time-stamp counter never steps
// back.
func TestRestoreGoesOn(t *testing.T) {
	c := fullConfig(t, "memwriter:size=8M,words=16,order=random,seed=5")
	c.CPUs = 2
	c.Memory.Size = 32 << 20
	m := newVM(t, c, newConsole())
	rounds := labtest.Count(10, 100)
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rounds)*time.Minute)
	defer cancel()
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	for range rounds {
		runUntil(t, m, 1000)
		if err := m.Pause(ctx); err != nil {
			t.Fatal(err)
		}
		paused, err := payload.ReadMemWriter(m.mem)
		if err != nil {
			t.Fatal(err)
		}
		m = restoreOf(t, m, c, RestoreOptions{NewGenerationID: true})
		if now, err := payload.ReadMemWriter(m.mem); err != nil || now.Writes != paused.Writes {
			t.Fatalf("%d writes before the first instruction after %d, %v", now.Writes, paused.Writes, err)
		}
		if err := m.Resume(ctx); err != nil {
			t.Fatal(err)
		}
	}
	runUntil(t, m, 1000)
	if err := payload.CommandMemWriter(m.mem, payload.CommandFinish); err != nil {
		t.Fatal(err)
	}
	exit, err := m.Wait(ctx)
	if err != nil || exit.Reason != ExitStatus || exit.Status != 0 {
		t.Fatalf("exit %+v, %v, want status 0", exit, err)
	}
	end, err := payload.ReadMemWriter(m.mem)
	if err != nil || end.Errors != 0 || end.Checks != 1 {
		t.Errorf("status %+v, %v", end, err)
	}
	if hz := uint64(10e9); end.MaxGapCycles > 3600*hz {
		t.Errorf("a gap of %d cycles: the time-stamp counter stepped back", end.MaxGapCycles)
	}
	labtest.Proof(t, "restore-native", "%d saves and restores of a guest that checks its memory: %d pages written, none wrong", rounds, end.Writes)
}

// TestSaveStateIsStable: a state saved twice is the same, and so is that of the
// VM it is restored into.
func TestSaveStateIsStable(t *testing.T) {
	c := fullConfig(t, "memwriter:size=2M")
	c.CPUs = 2
	c.Console = config.ConsoleVirtio
	c.Nets = []config.Net{{Mode: config.NetSocket, Path: deafPeer(t)}}
	m := newVM(t, c, newConsole())
	ctx := deadline(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	runUntil(t, m, 100)
	if _, err := m.SaveState(ctx); !errors.Is(err, api.ErrWrongState) {
		t.Errorf("save of a running VM: %v", err)
	}
	if err := m.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	first, second := decoded(t, saveOf(t, m)), decoded(t, saveOf(t, m))
	if diff := cmp.Diff(first, second, protocmp.Transform()); diff != "" {
		t.Errorf("two saves differ:\n%s", diff)
	}
	if len(first) != 11 {
		t.Errorf("%d sections, want machine, cpu, irqchip, clock, platform, pci and five devices", len(first))
	}
	id := m.platform.ged.State().GenerationID
	c.Name = "another" // and yet the saved addresses
	c.Nets[0].Path = deafPeer(t)
	r := restoreOf(t, m, c, RestoreOptions{})
	again := decoded(t, saveOf(t, r))
	if diff := cmp.Diff(first, again, protocmp.Transform()); diff != "" {
		t.Errorf("the restored state differs:\n%s", diff)
	}
	var inMemory [16]byte
	if err := r.mem.ReadAt(inMemory[:], vmGenIDBase); err != nil || inMemory != id {
		t.Errorf("generation ID %x in memory, want %x, %v", inMemory, id, err)
	}
}

// TestRestoreChangesGeneration: the guest is told when it is another VM.
func TestRestoreChangesGeneration(t *testing.T) {
	c := payloadConfig("spin")
	m := newVM(t, c, newConsole())
	ctx := deadline(t)
	if err := errors.Join(m.Start(ctx), m.Pause(ctx)); err != nil {
		t.Fatal(err)
	}
	before := m.platform.ged.State()
	r := restoreOf(t, m, c, RestoreOptions{NewGenerationID: true})
	after := r.platform.ged.State()
	if after.GenerationID == before.GenerationID || after.Events == 0 {
		t.Errorf("generation %x, events %#x; before %x", after.GenerationID, after.Events, before.GenerationID)
	}
	var inMemory [16]byte
	if err := r.mem.ReadAt(inMemory[:], vmGenIDBase); err != nil || inMemory != after.GenerationID {
		t.Errorf("generation ID %x in memory, want %x, %v", inMemory, after.GenerationID, err)
	}
}

// TestRestoreClock: kvmclock goes on from where it was, or jumps when it shall.
func TestRestoreClock(t *testing.T) {
	c := payloadConfig("spin")
	for _, advance := range []bool{false, true} {
		m := newVM(t, c, newConsole())
		ctx := deadline(t)
		if err := errors.Join(m.Start(ctx), m.Pause(ctx)); err != nil {
			t.Fatal(err)
		}
		sections := saveOf(t, m)
		saved := changeClock(t, sections, -time.Hour)
		r, err := Restore(ctx, c, sections, copyOf(m.mem), RestoreOptions{Options: quiet(), AdvanceClock: advance})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		now, err := r.kvm.Clock()
		if err != nil {
			t.Fatal(err)
		}
		if jumped := time.Duration(now.Clock) >= saved+time.Hour; jumped != advance || time.Duration(now.Clock) < saved {
			t.Errorf("advance %v: kvmclock was %s and is %s", advance, saved, time.Duration(now.Clock))
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
}

// changeClock moves when a state was saved, and returns its kvmclock.
func changeClock(t testing.TB, sections []state.Section, by time.Duration) time.Duration {
	t.Helper()
	var clock state.Clock
	alter(t, sections, "clock", &clock, func() { clock.RealtimeNs += uint64(by) })
	return time.Duration(clock.KvmclockNs)
}

// alter decodes a section into x, changes x and encodes it again.
func alter(t testing.TB, sections []state.Section, name string, x proto.Message, change func()) {
	t.Helper()
	for i, s := range sections {
		if s.Name != name {
			continue
		}
		if err := state.Decode(s, x); err != nil {
			t.Fatal(err)
		}
		change()
		var err error
		if sections[i], err = state.Encode(name, x); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatalf("no section %q", name)
}

// savedFull returns the state of a paused machine with devices, which has ended,
// and the configuration that fits it.
func savedFull(t testing.TB) (config.Config, []state.Section) {
	t.Helper()
	c := fullConfig(t, "spin")
	m := newVM(t, c, newConsole())
	ctx := deadline(t)
	if err := errors.Join(m.Start(ctx), m.Pause(ctx)); err != nil {
		t.Fatal(err)
	}
	sections := saveOf(t, m)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	return c, sections
}

func quiet() Options { return Options{Console: newConsole()} }

func noMemory(*memory.Space) error { return nil }

// TestRestoreRefuses: what does not fit is refused by its name, and leaves
// nothing behind.
func TestRestoreRefuses(t *testing.T) {
	c, sections := savedFull(t)
	missing := func(name string) func(*config.Config, []state.Section) []state.Section {
		return func(_ *config.Config, s []state.Section) []state.Section {
			var kept []state.Section
			for _, section := range s {
				if section.Name != name {
					kept = append(kept, section)
				}
			}
			return kept
		}
	}
	var cpu state.CPU
	var block state.Virtio
	for _, tt := range []struct {
		name   string
		change func(*config.Config, []state.Section) []state.Section
		want   string
	}{
		{"no machine", missing("machine"), `"machine": is missing`},
		{"no CPU", missing("cpu"), `"cpu": is missing`},
		{"no interrupts", missing("irqchip"), `"irqchip": is missing`},
		{"no clock", missing("clock"), `"clock": is missing`},
		{"no platform", missing("platform"), `"platform": is missing`},
		{"no bus", missing("pci"), `"pci": is missing`},
		{"no disk", missing("blk0"), `"blk0": is missing`},
		{"CPUs", func(c *config.Config, s []state.Section) []state.Section { c.CPUs = 2; return s }, "1 vCPUs"},
		{"memory", func(c *config.Config, s []state.Section) []state.Section { c.Memory.Size *= 2; return s }, "bytes of memory"},
		{"another disk", func(c *config.Config, s []state.Section) []state.Section {
			c.Disks = append(c.Disks, c.Disks[0])
			return s
		}, "blk1"},
		{"no rng", func(c *config.Config, s []state.Section) []state.Section { c.RNG = false; return s }, "rng0"},
		{"a longer disk", func(c *config.Config, s []state.Section) []state.Section {
			c.Disks = []config.Disk{{Path: testDisk(t, "longer", 2<<20)}}
			return s
		}, "1048576 bytes"},
		{"no such disk", func(c *config.Config, s []state.Section) []state.Section {
			c.Disks = []config.Disk{{Path: filepath.Join(t.TempDir(), "absent")}}
			return s
		}, "absent"},
		{"a feature", func(_ *config.Config, s []state.Section) []state.Section {
			alter(t, s, "cpu", &cpu, func() {
				for _, l := range cpu.Cpuid {
					if l.Function == leafFeatures {
						l.Ecx |= 1 << 5 // never given to a guest
					}
				}
			})
			return s
		}, "vmx"},
		{"an MSR", func(_ *config.Config, s []state.Section) []state.Section {
			alter(t, s, "cpu", &cpu, func() { cpu.Vcpus[0].MsrIndices[0], cpu.Vcpus[0].MsrValues[0] = 0xdead, 1 })
			return s
		}, "MSR 0xdead"},
		{"APIC", func(_ *config.Config, s []state.Section) []state.Section {
			alter(t, s, "cpu", &cpu, func() { cpu.Vcpus[0].Lapic = cpu.Vcpus[0].Lapic[1:] })
			return s
		}, "local APIC"},
		{"registers that no CPU has", func(_ *config.Config, s []state.Section) []state.Section {
			alter(t, s, "cpu", &cpu, func() {
				sregs := cpu.Vcpus[0].Sregs
				for i := range 100 {
					sregs[len(sregs)-1-i] = 0xff
				}
			})
			return s
		}, "KVM_SET_SREGS"},
		{"a queue outside memory", func(_ *config.Config, s []state.Section) []state.Section {
			alter(t, s, "blk0", &block, func() {
				block.Status, block.DriverFeatures = 15, 1<<32
				block.Queues[0].Enabled = true
				block.Queues[0].Desc = 1 << 50
			})
			return s
		}, `"blk0"`},
		{"another device", func(_ *config.Config, s []state.Section) []state.Section {
			alter(t, s, "blk0", &block, func() { block.DeviceId = 1 })
			return s
		}, "type 1"},
		{"newer", func(_ *config.Config, s []state.Section) []state.Section { s[4].Version = 99; return s }, `"platform": version 99`},
		{"twice", func(_ *config.Config, s []state.Section) []state.Section { return append(s, s[0]) }, "twice"},
		{"unknown", func(_ *config.Config, s []state.Section) []state.Section { s[0].Name = "gpu0"; return s }, `"gpu0"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg, altered := c, append([]state.Section(nil), sections...)
			altered = tt.change(&cfg, altered)
			fds := countFDs(t)
			m, err := Restore(t.Context(), cfg, altered, noMemory, RestoreOptions{Options: quiet()})
			if err == nil {
				_ = m.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q does not say %q", err, tt.want)
			}
			if got := countFDs(t); got != fds {
				t.Errorf("%d descriptors after the failure, %d before", got, fds)
			}
		})
	}
}

// TestRestoreFails: an error of who fills the memory is the error.
func TestRestoreFails(t *testing.T) {
	c, sections := savedFull(t)
	broken := errors.New("the snapshot is broken")
	if _, err := Restore(t.Context(), c, sections, func(*memory.Space) error { return broken }, RestoreOptions{Options: quiet()}); !errors.Is(err, broken) {
		t.Errorf("error %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	m, err := Restore(ctx, c, sections, noMemory, RestoreOptions{Options: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil { // never resumed
		t.Error(err)
	}
}

// TestCheckFeatures names what a host lacks, and which CPU it is not.
func TestCheckFeatures(t *testing.T) {
	vendor := kvm.CPUIDEntry{Function: 0, EBX: 0x756e6547, EDX: 0x49656e69, ECX: 0x6c65746e}
	features := kvm.CPUIDEntry{Function: 1, ECX: 1<<25 | 1<<28, EDX: 1 << 10}
	more := kvm.CPUIDEntry{Function: 7, EBX: 1 << 5, ECX: 0x1f << 17, EDX: 1 << 4}
	guest := []kvm.CPUIDEntry{vendor, features, more}
	if err := checkFeatures(guest, guest); err != nil {
		t.Error(err)
	}
	err := checkFeatures(guest, []kvm.CPUIDEntry{vendor, {Function: 1, ECX: 1 << 28}})
	var missing *FeatureError
	if want := []string{"aes", "bit 10 of CPUID 0x1.0 EDX", "avx2", "fsrm"}; !errors.As(err, &missing) || !cmp.Equal(missing.Missing, want) {
		t.Errorf("missing %v, want %v", err, want)
	}
	other := vendor
	other.EBX = binary.LittleEndian.Uint32([]byte("Auth"))
	if err := checkFeatures(guest, []kvm.CPUIDEntry{other}); err == nil || !strings.Contains(err.Error(), "GenuineIntel") {
		t.Errorf("another vendor: %v", err)
	}
	for _, w := range featureWords() {
		if n := len(strings.Fields(w.names)); n > 32 {
			t.Errorf("CPUID %#x.%d %s: %d names", w.leaf, w.index, w.register, n)
		}
	}
}
