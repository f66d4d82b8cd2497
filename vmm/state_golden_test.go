package vmm

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/protobuf/proto"

	"ditto.vm/internal/labtest"
	"ditto.vm/migration/state"
	"ditto.vm/vmm/config"
)

var update = flag.Bool("update", false, "write the golden state of the version that is current")

// goldenFolder holds one state of version 1: payload, two vCPUs, every device.
const goldenFolder = "testdata/state-v1"

// goldenConfig is the machine of the golden state.
func goldenConfig(t testing.TB) config.Config {
	c := fullConfig(t, "memwriter:size=2M")
	c.CPUs = 2
	c.Console = config.ConsoleVirtio
	c.Nets = []config.Net{{Mode: config.NetSocket, Path: "net.sock"}}
	return c
}

// readGolden returns the sections of the golden state.
func readGolden(t testing.TB) []state.Section {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(goldenFolder, "*.bin"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no golden state: %v", err)
	}
	var sections []state.Section
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Base(path)
		sections = append(sections, state.Section{Name: name[:len(name)-len(".bin")], Version: 1, Bytes: b})
	}
	return sections
}

// TestGoldenState: what version 1 wrote is read for as long as version 1 is.
func TestGoldenState(t *testing.T) {
	c := goldenConfig(t)
	if *update {
		writeGolden(t, c)
	}
	s, err := decodeState(readGolden(t), &c)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.cpu.vcpus) != 2 || len(s.cpu.vcpus[0].msrs) == 0 || len(s.devices) != 5 || s.clock.kvmclock == 0 {
		t.Errorf("%d vCPUs, %d devices, kvmclock %s", len(s.cpu.vcpus), len(s.devices), s.clock.kvmclock)
	}
	if got := cpuidLeaf(s.cpu.cpuid, leafFeatures, 0).EBX >> 16 & 0xff; got != 2 {
		t.Errorf("the guest has %d CPUs in its CPUID", got)
	}
}

func writeGolden(t *testing.T, c config.Config) {
	t.Helper()
	c.Nets[0].Path = deafPeer(t)
	m := newVM(t, c, newConsole())
	ctx := deadline(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	runUntil(t, m, 100)
	if err := m.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(goldenFolder, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, s := range saveOf(t, m) {
		if err := os.WriteFile(filepath.Join(goldenFolder, s.Name+".bin"), s.Bytes, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// fuzzSection fuzzes what reads the section of a name into m and returns what it
// made of it. What is read is written again and read as the same.
func fuzzSection[M proto.Message](f *testing.F, name string, read func(M) (M, error)) {
	for _, s := range readGolden(f) {
		if s.Name == name {
			f.Add(s.Bytes)
			f.Add(s.Bytes[:len(s.Bytes)/2])
		}
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		var zero M
		m := zero.ProtoReflect().New().Interface().(M)
		if state.Decode(state.Section{Name: name, Version: 1, Bytes: data}, m) != nil {
			return
		}
		written, err := read(m)
		if err != nil {
			return
		}
		again, err := read(written)
		if err != nil || !proto.Equal(again, written) {
			t.Errorf("%v is read again as %v, %v", written, again, err)
		}
	})
}

// FuzzCPU reads sections of vCPUs.
func FuzzCPU(f *testing.F) {
	fuzzSection(f, "cpu", func(x *state.CPU) (*state.CPU, error) {
		s, err := decodeCPU(x)
		if err != nil {
			return nil, err
		}
		_ = checkFeatures(s.cpuid, nil)
		for _, c := range s.vcpus {
			_, _ = c.checkMSRs(nil), c.after(1).timeMSRs(msrTSC, msrTSCDeadline)
		}
		return s.message()
	})
}

// FuzzIRQChip reads sections of interrupt controllers.
func FuzzIRQChip(f *testing.F) {
	fuzzSection(f, "irqchip", func(x *state.IRQChip) (*state.IRQChip, error) {
		s, err := decodeChips(x)
		if err != nil {
			return nil, err
		}
		return s.message()
	})
}

// FuzzClock reads sections of kvmclock.
func FuzzClock(f *testing.F) {
	fuzzSection(f, "clock", func(x *state.Clock) (*state.Clock, error) {
		s, err := decodeClock(x)
		return s.message(), err
	})
}

// FuzzMachine compares sections of machines with one.
func FuzzMachine(f *testing.F) {
	c := goldenConfig(f)
	fuzzSection(f, "machine", func(x *state.Machine) (*state.Machine, error) {
		return x, checkMachine(x, &c)
	})
}

// TestRestoreHostile: sections with random bytes changed are refused or make a
// guest that runs into its own trouble, and never the VMM's.
func TestRestoreHostile(t *testing.T) {
	c, sections := savedFull(t)
	r := rand.New(rand.NewPCG(7, 11))
	restored, refused := 0, 0
	for range labtest.Count(40, 1000) {
		altered := append([]state.Section(nil), sections...)
		for range 1 + r.IntN(3) {
			s := &altered[r.IntN(len(altered))]
			s.Bytes = append([]byte(nil), s.Bytes...)
			for range 1 + r.IntN(4) {
				s.Bytes[r.IntN(len(s.Bytes))] ^= 1 << r.IntN(8)
			}
		}
		m, err := Restore(t.Context(), c, altered, noMemory, RestoreOptions{Options: quiet()})
		if err != nil {
			refused++
			continue
		}
		restored++
		err = errors.Join(m.Resume(t.Context()), m.Close())
		if err != nil {
			t.Logf("a guest of altered sections: %v", err)
		}
	}
	if refused == 0 || restored == 0 {
		t.Errorf("%d altered states restored, %d refused", restored, refused)
	}
	labtest.Proof(t, "restore-hostile", "%s", fmt.Sprintf("%d altered states: %d refused, %d made a guest", restored+refused, refused, restored))
}
