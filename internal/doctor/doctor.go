package doctor

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Status is what a finding means for ditto.
type Status string

// The statuses.
const (
	OK      Status = "ok"
	Warn    Status = "warn"    // ditto works, something is slower or cannot be used
	Missing Status = "missing" // ditto cannot run Linux guests without it
)

// Finding is one thing that was looked at.
type Finding struct {
	Area   string `json:"area"`
	Name   string `json:"name"`
	Status Status `json:"status"`
	Value  string `json:"value"`
	// Cure is what to do, empty if nothing is to be done.
	Cure string `json:"cure,omitempty"`
}

// Report is what was found.
type Report struct {
	// Ready says whether Linux guests can run.
	Ready    bool      `json:"ready"`
	Findings []Finding `json:"findings"`
	// Err is why not; it wraps the errors of package kvm.
	Err error `json:"-"`
}

// Host is a host to look at.
type Host struct {
	// Root is the folder that /proc, /sys and /dev are read below, usually "/".
	Root string
	// UID is the user's.
	UID int
	// Probes are what is tried. Nil ones are left out of the report.
	KVM      func() (KVM, error)     // opens /dev/kvm
	WPAsync  func() error            // tries the wp-async tracker
	IOUring  func() error            // makes a ring
	Landlock func() int              // ABI version, 0 for none
	Tap      func() error            // tries to make a tap device
	Netd     func() (string, error)  // finds ditto-netd
	Limit    func() (uint64, uint64) // RLIMIT_MEMLOCK and RLIMIT_NOFILE, soft
}

// report collects findings.
type report struct {
	Report
	area string
}

func (r *report) add(s Status, name, value, cure string) {
	if s == OK {
		cure = ""
	}
	r.Findings = append(r.Findings, Finding{Area: r.area, Name: name, Status: s, Value: value, Cure: cure})
}

// Examine looks at everything.
func (h *Host) Examine() Report {
	r := &report{}
	for _, area := range []struct {
		name  string
		check func(*report)
	}{
		{"host", h.checkHost}, {"kvm", h.checkKVM}, {"memory", h.checkMemory}, {"tracking", h.checkTracking},
		{"network", h.checkNetwork}, {"disk", h.checkDisk}, {"sandbox", h.checkSandbox},
	} {
		r.area = area.name
		area.check(r)
	}
	r.Ready = r.Err == nil
	return r.Report
}

// read returns the trimmed content of a file below the root, or "".
func (h *Host) read(path string) string {
	data, err := os.ReadFile(filepath.Join(h.Root, path))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

func (h *Host) exists(path string) bool {
	_, err := os.Stat(filepath.Join(h.Root, path))
	return err == nil
}

// number reads a file that holds one number.
func (h *Host) number(path string) (uint64, bool) {
	n, err := strconv.ParseUint(h.read(path), 10, 64)
	return n, err == nil
}

// field returns what follows a name in a file such as /proc/meminfo.
func (h *Host) field(path, name string) string {
	for line := range strings.Lines(h.read(path)) {
		key, value, found := strings.Cut(line, ":")
		if found && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// chosen returns the word in brackets of a file such as
// /sys/kernel/mm/transparent_hugepage/enabled.
func (h *Host) chosen(path string) string {
	_, rest, found := strings.Cut(h.read(path), "[")
	word, _, closed := strings.Cut(rest, "]")
	if !found || !closed {
		return ""
	}
	return word
}

// size prints bytes in the unit that suits.
func size(bytes uint64) string {
	const gib, mib = 1 << 30, 1 << 20
	switch {
	case bytes >= 10*gib:
		return fmt.Sprintf("%d GiB", bytes/gib)
	case bytes >= gib:
		return fmt.Sprintf("%.1f GiB", float64(bytes)/gib)
	}
	return fmt.Sprintf("%d MiB", bytes/mib)
}
