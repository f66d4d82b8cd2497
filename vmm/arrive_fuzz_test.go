package vmm

import (
	"encoding/json"
	"testing"

	"ditto.vm/memory"
	"ditto.vm/migration/live"
	"ditto.vm/migration/state"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/kvm"
)

// FuzzOffer: what a peer offers is refused, or it describes the machine that its
// own configuration makes, with a CPU that can be compared with the host's.
func FuzzOffer(f *testing.F) {
	c := payloadConfig("spin")
	c.Disks = []config.Disk{{Path: "/disk.img"}}
	text, err := json.Marshal(c)
	if err != nil {
		f.Fatal(err)
	}
	cpus := &cpuSection{cpuid: []kvm.CPUIDEntry{{Function: 0, EBX: 1}, {Function: 7, ECX: 8}}, tscKHz: 3e6}
	x, err := cpus.message()
	if err != nil {
		f.Fatal(err)
	}
	section, err := state.Encode("cpu", x)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(text), section.Bytes, uint64(16<<20))
	f.Add([]byte(text), []byte{}, uint64(16<<20))
	f.Add([]byte(`{"memory":{"size":"1T"},"cpus":9999}`), section.Bytes, uint64(1<<40))
	f.Add([]byte(`{}`), []byte{0x0a, 0xff}, uint64(0))
	f.Fuzz(func(t *testing.T, text, cpu []byte, size uint64) {
		o := live.Offer{Name: "vm", Config: text, CPU: state.Section{Name: "cpu", Version: section.Version, Bytes: cpu}}
		o.RAM = []memory.Range{{Size: size}}
		cfg, err := config.Parse(text)
		if err != nil {
			cfg = c
		}
		got, err := checkOffer(o, &cfg)
		if err != nil {
			return
		}
		if n := len(got.cpuid); n == 0 || n > maxCPUIDLeaves || got.tscKHz > maxTSCKHz || uint64(cfg.Memory.Size) != size {
			t.Errorf("%d leaves of CPUID, %d kHz, %d bytes of memory, %d offered", n, got.tscKHz, cfg.Memory.Size, size)
		}
		_ = checkFeatures(got.cpuid, cpus.cpuid)
	})
}
