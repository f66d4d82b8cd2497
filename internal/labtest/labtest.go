// Package labtest marks tests that boot Linux guests, and figures that tests
// measure.
//
// A test that needs a KVM which can run Linux is called TestLab... or
// TestLinux... and begins with [Need] or a probe of its own. The package is
// listed in internal/labrun; `make test` compiles its test binary, boots one
// emulated host and runs these tests there, where a skip is a failure. A test
// that runs on any KVM needs nothing of this.
package labtest

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// Environment of tests.
const (
	// EnvInside is "1" in the emulated host (see internal/lab).
	EnvInside = "DITTO_LAB"
	// EnvLinuxKVM is "1" on a machine whose own KVM runs Linux guests.
	EnvLinuxKVM = "DITTO_KVM_LINUX"
	// EnvRequireKVM turns skips for want of KVM into failures.
	EnvRequireKVM = "DITTO_REQUIRE_KVM"
	// EnvBoot is "1" where tests may boot emulated hosts themselves.
	EnvBoot = "DITTO_LAB_BOOT"
	// EnvProve asks for full counts instead of small ones.
	EnvProve = "DITTO_PROVE"
	// EnvBin is the folder that holds the built commands (ditto, ditto-netd).
	EnvBin = "DITTO_BIN"
)

// Inside tells whether this process runs where KVM can run Linux guests: in
// the emulated host, or on a machine that was said to do so.
func Inside() bool {
	return os.Getenv(EnvInside) == "1" || os.Getenv(EnvLinuxKVM) == "1"
}

// Need skips the test unless Linux guests can be run here.
func Need(t testing.TB) {
	t.Helper()
	if Inside() {
		return
	}
	const cure = "needs a KVM that runs Linux; try: make lab-test, or go run ./cmd/ditto-lab test ./PACKAGE"
	t.Skip(cure)
}

// NeedBoot skips a test that boots emulated hosts itself, which takes long and
// much memory, unless that was asked for. Such a test is called TestBoot...
func NeedBoot(t testing.TB) {
	t.Helper()
	if os.Getenv(EnvBoot) != "1" {
		t.Skip("boots an emulated host; try: make lab-test, or set " + EnvBoot + "=1")
	}
}

// Count returns the full count when proving and the small one otherwise.
func Count(small, full int) int {
	if os.Getenv(EnvProve) == "1" {
		return full
	}
	return small
}

// proofMark begins a line of test output that states a measured figure.
const proofMark = "PROOF "

// Proof states the figure measured for a claim of docs/proofs.md. When proving,
// it becomes the claim's last figure.
func Proof(t testing.TB, id, format string, args ...any) {
	t.Helper()
	t.Log(proofMark + id + ": " + fmt.Sprintf(format, args...))
}

// ParseProof finds a figure in a line of test output.
func ParseProof(line string) (id, figure string, ok bool) {
	_, rest, ok := strings.Cut(line, proofMark)
	if !ok {
		return "", "", false
	}
	id, figure, ok = strings.Cut(rest, ": ")
	if !ok || id == "" || strings.ContainsAny(id, " |") {
		return "", "", false
	}
	return id, strings.TrimSpace(figure), true
}
