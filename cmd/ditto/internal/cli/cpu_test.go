package cli

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/vmm"
)

// needHostCPU skips where the host's CPU cannot be asked for.
func needHostCPU(t *testing.T) vmm.CPUModel {
	t.Helper()
	m, err := vmm.HostCPU()
	if err != nil {
		if os.Getenv("DITTO_REQUIRE_KVM") != "" {
			t.Fatal(err)
		}
		t.Skipf("%v: run it where /dev/kvm can be opened", err)
	}
	return m
}

// TestCPU makes a CPU that two hosts can run, one of which is this.
func TestCPU(t *testing.T) {
	host := needHostCPU(t)
	h := newHost(t)
	dir := t.TempDir()
	here, other, both := filepath.Join(dir, "here.yaml"), filepath.Join(dir, "other.json"), filepath.Join(dir, "both.yaml")
	h.want("cpu", "-o", here)

	// The other host has no POPCNT.
	theirs := vmm.CPUModel{Vendor: host.Vendor}
	for _, f := range host.Features {
		if f != "popcnt" {
			theirs.Features = append(theirs.Features, f)
		}
	}
	data, err := theirs.Encode(other)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(other, data, 0o600); err != nil {
		t.Fatal(err)
	}
	h.want("cpu", "common", here, other, "-o", both)
	common, err := vmm.LoadCPUModel(both)
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains(common.Features, "popcnt") || len(common.Features) == 0 || common.Vendor != host.Vendor {
		t.Errorf("common: %+v", common)
	}
	if out := h.want("cpu", "check", both); !strings.Contains(out, "this host runs its guests") {
		t.Errorf("%q", out)
	}
	var shown, baseline vmm.CPUModel
	if err := json.Unmarshal([]byte(h.want("cpu", "--json")), &shown); err != nil || !slices.Equal(shown.Features, host.Features) {
		t.Errorf("%v, %+v", err, shown)
	}
	if err := json.Unmarshal([]byte(h.want("cpu", "--baseline", "--json")), &baseline); err != nil {
		t.Fatal(err)
	}
	if err := baseline.Missing(host); err != nil || len(baseline.Features) == 0 || len(baseline.Features) >= len(host.Features) {
		t.Errorf("%v, baseline %+v", err, baseline)
	}
	if out := h.want("cpu"); !strings.Contains(out, host.Vendor) || !strings.Contains(out, "sse2") {
		t.Errorf("%q", out)
	}
}

// TestCPURefused: files that are no CPU, or not one of this host, say why.
func TestCPURefused(t *testing.T) {
	host := needHostCPU(t)
	h := newHost(t)
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	lacking := ""
	for _, f := range []string{"avx512er", "avx512_4vnniw", "xop", "fma4"} { // no CPU has all
		if !slices.Contains(host.Features, f) {
			lacking = f
			break
		}
	}
	features := strings.Join(append(slices.Clone(host.Features), "xsave", "avx", "avx2", "avx512f", lacking), ", ")
	good := write("good.yaml", "vendor: "+host.Vendor+"\nfeatures: ["+strings.Join(host.Features, ", ")+"]\n")
	for _, test := range []struct {
		code int
		want string
		args []string
	}{
		{exit.Usage, "write one with 'ditto cpu -o FILE'", []string{"cpu", "check", filepath.Join(dir, "none")}},
		{exit.Usage, "unknown features", []string{"cpu", "check", write("u.yaml", "vendor: X\nfeatures: [fpu, warp]\n")}},
		{exit.Usage, "without which no 64-bit guest starts", []string{"cpu", "check", write("l.yaml", "vendor: X\nfeatures: [fpu]\n")}},
		{exit.Failure, lacking, []string{"cpu", "check", write("m.yaml", "vendor: "+host.Vendor+"\nfeatures: ["+features+"]\n")}},
		{exit.Usage, "exists", []string{"cpu", "-o", good}},
	} {
		code, out, errs := h.do(test.args...)
		if code != test.code || out != "" || !strings.Contains(errs, test.want) || strings.Count(errs, "\n") != 1 {
			t.Errorf("%v: code %d, %q, %q, want %d and %q", test.args, code, out, errs, test.code, test.want)
		}
	}
}
