package vmm

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ditto.vm/memory"
	"ditto.vm/migration/live"
	"ditto.vm/migration/state"
	"ditto.vm/vmm/config"
)

// TestArrivalRefused: what this host lacks is said before memory moves, in words
// that tell what to do, and nothing is left.
func TestArrivalRefused(t *testing.T) {
	c := fullConfig(t, "memwriter:size=2M")
	m := newVM(t, c, newConsole())
	if err := m.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	offer, err := m.MigrationSource().Offer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "other.img")
	if err := os.WriteFile(other, make([]byte, 2<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func(o *live.Offer, c *config.Config)
		says   string
	}{
		{"another CPU", func(o *live.Offer, _ *config.Config) {
			o.CPU = offeredCPU(t, o, func(x *state.CPU) {
				for _, l := range x.Cpuid {
					if l.Function == 0x7 && l.Index == 0 {
						l.Ecx |= 1<<3 | 1<<4 // pku, and what goes with it
						l.Ebx |= 1 << 28     // avx512cd
						l.Edx |= 1 << 2
					}
				}
			})
		}, "this host's CPU lacks what the guest uses: "},
		{"another vendor", func(o *live.Offer, _ *config.Config) {
			o.CPU = offeredCPU(t, o, func(x *state.CPU) {
				for _, l := range x.Cpuid {
					if l.Function == 0 {
						l.Ebx, l.Edx, l.Ecx = 0x68747541, 0x69746e65, 0x444d4164
						if host := cpuVendor(m.cpuid); host == "DMAc" || host == "AuthenticAMD" {
							l.Ebx, l.Edx, l.Ecx = 0x756e6547, 0x49656e69, 0x6c65746e
						}
					}
				}
			})
		}, "this host's is of"},
		{"no CPU", func(o *live.Offer, _ *config.Config) { o.CPU = state.Section{} }, "where its CPU should be"},
		{"more vCPUs", func(_ *live.Offer, c *config.Config) { c.CPUs = 2 }, "1 vCPUs, and this one 2"},
		{"less memory", func(_ *live.Offer, c *config.Config) { c.Memory.Size /= 2 }, "bytes of memory"},
		{"more memory than there is", func(o *live.Offer, c *config.Config) {
			c.Memory.Size = 1 << 39
			o.RAM, _ = memory.Layout(1 << 39)
			o.Config = []byte(strings.Replace(string(o.Config), `"size":"16M"`, `"size":"512G"`, 1))
		}, "are available here"},
		{"no rng", func(_ *live.Offer, c *config.Config) { c.RNG = false }, `"rng0"`},
		{"no disk", func(_ *live.Offer, c *config.Config) { c.Disks[0].Path += ".gone" }, "does not exist"},
		{"another disk", func(_ *live.Offer, c *config.Config) { c.Disks[0].Path = other }, "share it, or have it copied"},
		{"a tap that cannot be", func(o *live.Offer, c *config.Config) {
			c.Nets = []config.Net{{Mode: config.NetTap, Tap: "ditto-test", Bridge: "no-such-br", MAC: "02:00:00:00:00:01"}}
			text, err := json.Marshal(c)
			if err != nil {
				t.Fatal(err)
			}
			o.Config = text
		}, "net 0 (tap)"},
		{"nonsense", func(o *live.Offer, _ *config.Config) { o.Config = []byte("{") }, "the offered VM"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o, cfg := offer, c
			cfg.Disks = slices.Clone(c.Disks)
			tc.change(&o, &cfg)
			before := countFDs(t)
			a, err := PrepareArrival(t.Context(), o, cfg, Options{Console: newConsole()})
			if err == nil {
				_ = a.Abandon()
			}
			if err == nil || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("%v, want %q", err, tc.says)
			}
			if strings.Contains(fmt.Sprint(err), "\n") {
				t.Errorf("more than one line: %v", err)
			}
			// Fewer are of machines of other tests, whose rings end late.
			if now := countFDs(t); now > before {
				t.Errorf("%d descriptors, %d before", now, before)
			}
			t.Log(err)
		})
	}
}

// offeredCPU changes what an offer says of CPUs.
func offeredCPU(t *testing.T, o *live.Offer, change func(*state.CPU)) state.Section {
	t.Helper()
	var x state.CPU
	if err := state.Decode(o.CPU, &x); err != nil {
		t.Fatal(err)
	}
	change(&x)
	s, err := state.Encode("cpu", &x)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestRoomFor: memory is what the host and every control group have left.
func TestRoomFor(t *testing.T) {
	root := t.TempDir()
	for path, text := range map[string]string{
		"proc/meminfo":                        "MemTotal:  9000 kB\nMemAvailable:    4096 kB\nSwapFree:  4096 kB\n",
		"proc/self/cgroup":                    "0::/a/b\n",
		"sys/fs/cgroup/a/memory.max":          "7340032\n",
		"sys/fs/cgroup/a/memory.current":      "1048576\n",
		"sys/fs/cgroup/a/b/memory.max":        "max\n",
		"sys/fs/cgroup/a/b/memory.current":    "4096\n",
		"sys/fs/cgroup/other/memory.max":      "1\n",
		"sys/fs/cgroup/other/memory.current":  "1\n",
		"sys/fs/cgroup/memory.current-is-not": "here",
	} {
		at := filepath.Join(root, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(at), 0o700), os.WriteFile(at, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := availableMemory(root); err != nil || got != 6<<20 {
		t.Errorf("%d bytes, %v; want 6 MiB", got, err)
	}
	for size, fits := range map[config.Bytes]bool{6 << 20: true, 7 << 20: false} {
		if err := roomFor(&config.Memory{Size: size}, root); (err == nil) != fits || err != nil && !errors.Is(err, ErrNoMemory) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	if err := roomFor(&config.Memory{Size: 7 << 20, HugePages: memory.HugePages2M}, root); err != nil {
		t.Errorf("a pool of its own: %v", err)
	}
	if err := roomFor(&config.Memory{Size: 1 << 40}, t.TempDir()); err != nil {
		t.Errorf("a host that does not say: %v", err)
	}
}
