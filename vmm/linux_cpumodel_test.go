package vmm

import (
	"slices"
	"strings"
	"testing"

	"ditto.vm/vmm/config"
)

// TestLinuxCPUModel: Linux on a CPU of the baseline finds its features, and none
// of those that the model names besides.
func TestLinuxCPUModel(t *testing.T) {
	requireLinux(t)
	c := linuxConfig(t, "6.12-cloud", `grep -m1 ^flags /proc/cpuinfo`)
	c.CPU = config.CPUBaseline
	out, exit := runLinux(t, c)
	if exit.Reason != ExitPowerOff {
		t.Errorf("exit %+v, want a power-off", exit)
	}
	_, line, found := strings.Cut(out, "flags\t\t: ")
	line, _, _ = strings.Cut(line, "\n")
	if !found {
		t.Fatalf("no flags in\n%s", out)
	}
	flags := strings.Fields(line)
	host, err := HostCPU()
	if err != nil {
		t.Fatal(err)
	}
	want := BaselineCPU(host).has()
	for _, f := range []string{"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3", "sse2", "lm"} {
		if want[f] && !slices.Contains(flags, f) {
			t.Errorf("no %s among %s", f, line)
		}
	}
	for _, f := range host.Features {
		if f == "3dnowprefetch" {
			continue // of an AMD CPU with long mode Linux says so whatever CPUID says
		}
		if !want[f] && slices.Contains(flags, f) {
			t.Errorf("%s is no part of the baseline, and Linux has it", f)
		}
	}
}
