package labtest

import (
	"os"
	"testing"
)

func TestLabHasKVM(t *testing.T) {
	Need(t)
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestParseProof(t *testing.T) {
	for _, tc := range []struct {
		line, id, figure string
		ok               bool
	}{
		{"    boot_test.go:12: PROOF boot-200: 200 boots, 0 leaks", "boot-200", "200 boots, 0 leaks", true},
		{"PROOF a: b: c", "a", "b: c", true},
		{"PROOF without figure", "", "", false},
		{"PROOF a b: c", "", "", false},
		{"PROOF a|b: c", "", "", false},
		{"PROOF : c", "", "", false},
		{"nothing", "", "", false},
	} {
		id, figure, ok := ParseProof(tc.line)
		if id != tc.id || figure != tc.figure || ok != tc.ok {
			t.Errorf("ParseProof(%q) = %q, %q, %v", tc.line, id, figure, ok)
		}
	}
}

func TestCount(t *testing.T) {
	t.Setenv(EnvProve, "")
	if got := Count(3, 100); got != 3 {
		t.Errorf("Count without proving = %d, want 3", got)
	}
	t.Setenv(EnvProve, "1")
	if got := Count(3, 100); got != 100 {
		t.Errorf("Count when proving = %d, want 100", got)
	}
}
