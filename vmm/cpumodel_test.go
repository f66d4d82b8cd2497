package vmm

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/kvm"
)

// skylake is the CPUID of a guest with AVX-512 and protection keys; the sizes
// are those of Intel SDM 1, 13.5.
func skylake() []kvm.CPUIDEntry {
	e := []kvm.CPUIDEntry{
		{Function: 0, EAX: 0x1f, EBX: 0x756e6547, EDX: 0x49656e69, ECX: 0x6c65746e},
		{Function: 1, EAX: 0x50654, ECX: 0xfffa3203, EDX: 0x1f8bfbff},
		{Function: 7, Flags: 1, EAX: 2, EBX: 0xd19f4fbb, ECX: 0x1f<<17 | 1<<3, EDX: 0xac000400},
		{Function: 7, Index: 1, Flags: 1, EAX: 1 << 5, EDX: 1 << 18},
		{Function: 7, Index: 2, Flags: 1, EDX: 0x1f},
		{Function: 0xd, Flags: 1, EAX: 0x2e7, EBX: 0xa88, ECX: 0xa88},
		{Function: 0xd, Index: 1, Flags: 1, EAX: 0xf, EBX: 0xa08, ECX: 1 << 8},
	}
	for _, c := range []struct{ index, size, offset uint32 }{{2, 0x100, 0x240}, {5, 0x40, 0x440}, {6, 0x200, 0x480}, {7, 0x400, 0x680}, {9, 8, 0xa80}} {
		e = append(e, kvm.CPUIDEntry{Function: 0xd, Index: c.index, Flags: 1, EAX: c.size, EBX: c.offset})
	}
	return append(e, []kvm.CPUIDEntry{
		{Function: 0x14, Flags: 1, EAX: 1}, {Function: 0x1f, Flags: 1, ECX: 0x100},
		{Function: leafKVMFeatures, EAX: 0x01007efb},
		{Function: leafExtMax, EAX: 0x80000021}, {Function: leafExtFeatures, ECX: 0x121, EDX: 0x2c100800},
		{Function: leafExtPower, EDX: 1 << 8}, {Function: leafExtSizes, EAX: 0x3028}, {Function: 0x80000021},
	}...)
}

// without is a model less some features and what needs them.
func without(m CPUModel, features ...string) CPUModel {
	has := m.has()
	for _, f := range features {
		delete(has, f)
	}
	dropUnmet(has)
	return CPUModel{m.Vendor, ordered(has)}
}

func TestFeatureNamesAreUnique(t *testing.T) {
	seen := map[string]bool{"-": true}
	for _, w := range featureWords() {
		for _, name := range strings.Fields(w.names) {
			if seen[name] && name != "-" {
				t.Errorf("%s is there twice", name)
			}
			seen[name] = true
		}
	}
	words := strings.Fields(bootFeatures + " " + baselineFeatures)
	for _, d := range featureNeeds {
		words = append(words, append(strings.Fields(d.features), d.needs)...)
	}
	for _, f := range append(words, platformFeatures...) {
		if !seen[f] {
			t.Errorf("%s is no feature", f)
		}
	}
	// One pass of dropUnmet is enough only in this order.
	for i, d := range featureNeeds {
		for _, later := range featureNeeds[i+1:] {
			if slices.Contains(strings.Fields(later.features), d.needs) {
				t.Errorf("%s is needed before what it needs, %s", d.needs, later.needs)
			}
		}
	}
}

// TestNarrowCPUID: what is left has the features of the model, no other, and
// sizes and highest leaves that fit.
func TestNarrowCPUID(t *testing.T) {
	all := modelOf(skylake())
	if err := all.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		model           CPUModel
		states, size    uint32
		basic, extended uint32
	}{
		"all":           {all, 0x2e7, 0xa88, 0x1f, 0x80000021},
		"no avx512":     {without(all, "avx512f"), 0x207, 0xa88, 0x1f, 0x80000021},
		"no avx512,pku": {without(all, "avx512f", "pku"), 0x7, 0x340, 0x1f, 0x80000021},
		"no avx":        {without(all, "avx", "pku"), 0x3, 0x240, 0x1f, 0x80000021},
		"baseline":      {BaselineCPU(all), 0, 0, 0x1f, 0x80000021},
	} {
		t.Run(name, func(t *testing.T) {
			got := narrowCPUID(skylake(), test.model)
			if diff := cmp.Diff(test.model, modelOf(got)); diff != "" {
				t.Errorf("-asked +got:\n%s", diff)
			}
			d := cpuidLeaf(got, leafXSAVE, 0)
			if d.EAX != test.states || d.ECX != test.size {
				t.Errorf("XSAVE states %#x of %#x bytes, want %#x of %#x", d.EAX, d.ECX, test.states, test.size)
			}
			if a, b := cpuidLeaf(got, 0, 0).EAX, cpuidLeaf(got, leafExtMax, 0).EAX; a != test.basic || b != test.extended {
				t.Errorf("highest leaves %#x and %#x", a, b)
			}
			for _, e := range got {
				if e.Function == leafXSAVE && e.Index > 1 && test.states&(1<<e.Index) == 0 {
					t.Errorf("there is a component %d", e.Index)
				}
				if e.Function == 0x14 || e.Function == 7 && e.Index > 1 {
					t.Errorf("leaf %#x.%d is there", e.Function, e.Index)
				}
			}
			if err := checkFeatures(got, skylake()); err != nil {
				t.Errorf("the host cannot run it: %v", err)
			}
			if err := checkFeatures(skylake(), got); name != "all" && err == nil {
				t.Error("it has all features of the host")
			}
		})
	}
}

// TestCPUModels: what is common runs on all, and nobody runs what he lacks.
func TestCPUModels(t *testing.T) {
	all := modelOf(skylake())
	a, b := without(all, "avx512f"), without(all, "aes")
	common, err := CommonCPU(a, b)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(common.Missing(a), common.Missing(b), BaselineCPU(a).Missing(common)); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(without(all, "avx512f", "aes"), common); diff != "" {
		t.Error(diff)
	}
	var missing *FeatureError
	if err := all.Missing(b); !errors.As(err, &missing) || !cmp.Equal(missing.Missing, []string{"aes"}) {
		t.Errorf("missing %v", err)
	}
	other := CPUModel{"AuthenticAMD", all.Features}
	if err := all.Missing(other); !errors.As(err, &missing) || missing.Host != "AuthenticAMD" {
		t.Errorf("another vendor: %v", err)
	}
	if m, err := CommonCPU(all, other); err == nil {
		t.Errorf("two vendors have %v in common", m)
	}
	for _, path := range []string{"a.yaml", "a.json"} {
		data, err := all.Encode(path)
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseCPUModel(data)
		if diff := cmp.Diff(all, again); err != nil || diff != "" {
			t.Errorf("%s: %v %s", path, err, diff)
		}
	}
}

func TestParseCPUModelRefuses(t *testing.T) {
	const boot = "fpu, tsc, msr, pae, cx8, cmov, mmx, fxsr, sse, sse2, syscall, lm"
	for text, want := range map[string]string{
		"":                        "vendor",
		"vendor: A\nfeatures: []": "lacks fpu",
		"vendor: A\nfeatures: [" + boot + ", avx]":                    "avx needs xsave",
		"vendor: A\nfeatures: [" + boot + ", wings, '-', xstate_avx]": `unknown features "wings", "-", "xstate_avx"`,
		"vendor: A\nfeature: []":                                      "unknown field",
		"vendor: \"a\\nb\"\nfeatures: [" + boot + "]":                 "vendor",
		"vendor: ThirteenChars\nfeatures: [" + boot + "]":             "vendor",
		"{":                               "yaml",
		strings.Repeat(" ", maxCPUFile+1): "larger than",
	} {
		if m, err := ParseCPUModel([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, %v; want %q", text, m, err, want)
		}
	}
	if _, err := ParseCPUModel([]byte("vendor: A\nfeatures: [" + boot + ", hypervisor]")); err != nil {
		t.Error(err)
	}
}

// FuzzCPUModel: no file crashes the reader; what it takes can be written, read
// again, and given to a guest.
func FuzzCPUModel(f *testing.F) {
	all := modelOf(skylake())
	for _, m := range []CPUModel{all, BaselineCPU(all), without(all, "xsave")} {
		for _, path := range []string{"a.yaml", "a.json"} {
			data, err := m.Encode(path)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(data)
		}
	}
	f.Add([]byte("a: &a [*a]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := ParseCPUModel(data)
		if err != nil {
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("error of several lines: %q", err)
			}
			return
		}
		out, err := m.Encode("a.yaml")
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseCPUModel(out)
		if diff := cmp.Diff(m, again); err != nil || diff != "" {
			t.Errorf("read again: %v %s", err, diff)
		}
		if err := checkFeatures(narrowCPUID(skylake(), m), skylake()); err != nil {
			t.Error(err)
		}
	})
}

// TestCPURuns: guests run on every kind of CPU that this host has, and one that
// it lacks is refused by the name of what is missing.
func TestCPURuns(t *testing.T) {
	requireKVM(t)
	host, err := HostCPU()
	if err != nil {
		t.Fatal(err)
	}
	write := func(m CPUModel) string {
		data, err := m.Encode("cpu.json")
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "cpu.json")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, cpu := range map[string]string{
		"host": config.CPUHost, "baseline": config.CPUBaseline, "file": write(host),
		"no avx512": write(without(host, "avx512f")), "no xsave": write(without(host, "xsave")),
	} {
		t.Run(name, func(t *testing.T) {
			c := writerConfig()
			c.CPU = cpu
			m := newVM(t, c, newConsole())
			if err := m.Start(deadline(t)); err != nil {
				t.Fatal(err)
			}
			runUntil(t, m, 1000)
			if got := modelOf(m.cpuid); name == "file" && !cmp.Equal(got, host) {
				t.Errorf("the guest's CPU is %v", got)
			}
			finishWriter(t, m)
		})
	}
	more := CPUModel{host.Vendor, append(slices.Clone(host.Features), "3dnow", "ia64")}
	c := writerConfig()
	c.CPU = write(more)
	if m, err := New(t.Context(), c, quiet()); err == nil || !strings.Contains(err.Error(), "ia64, 3dnow") {
		t.Errorf("VM %v, error %v, want the missing features", m, err)
	}
}

// TestCPURestores: a guest keeps the CPU that it was started with, without the
// file that described it.
func TestCPURestores(t *testing.T) {
	requireKVM(t)
	c := writerConfig()
	c.CPU = config.CPUBaseline
	dir, was := savedWriter(t, c, snapshot.None)
	c.CPU = filepath.Join(t.TempDir(), "gone.yaml")
	m := restoreFrom(t, dir, SnapshotOptions{Config: c})
	if now := digestMemory(t, m); now != was {
		t.Error("memory is another")
	}
	host, err := HostCPU()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(BaselineCPU(host), modelOf(m.cpuid)); diff != "" {
		t.Errorf("the CPU is another: %s", diff)
	}
	if err := m.Resume(deadline(t)); err != nil {
		t.Fatal(err)
	}
	finishWriter(t, m)
}
