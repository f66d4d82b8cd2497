package bench

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Host describes a machine on which something was measured.
type Host struct {
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	RAM    uint64 `json:"ram_bytes"`
	Kernel string `json:"kernel"`
	// KVM is the kind of KVM, such as "kvm_amd, npt=Y".
	KVM string `json:"kvm"`
	// QEMU is its version, empty if it is not installed.
	QEMU string `json:"qemu,omitempty"`
	// EmulatedOn is the machine on which this one is emulated, if it is.
	EmulatedOn *Host `json:"emulated_on,omitempty"`
}

// DescribeHost looks at the machine it runs on. What cannot be found out is
// "unknown".
func DescribeHost(ctx context.Context, qemu string) Host {
	h := Host{CPU: cpuModel(), Cores: runtime.NumCPU(), Kernel: "unknown", KVM: kvmKind("/sys/module")}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		h.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		h.RAM = uint64(info.Totalram) * uint64(info.Unit)
	}
	if qemu != "" {
		h.QEMU = qemuVersion(ctx, qemu)
	}
	return h
}

func cpuModel() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if key, value, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}

// kvmKind names the KVM module that is loaded and whether it uses nested
// paging. modules is /sys/module.
func kvmKind(modules string) string {
	for module, parameter := range map[string]string{"kvm_amd": "npt", "kvm_intel": "ept", "kvm_pvm": ""} {
		dir := filepath.Join(modules, module)
		if _, err := os.Stat(dir); err != nil {
			continue
		}
		value, err := os.ReadFile(filepath.Join(dir, "parameters", parameter))
		if parameter == "" || err != nil {
			return module
		}
		return module + ", " + parameter + "=" + strings.TrimSpace(string(value))
	}
	return "unknown"
}

// qemuVersion returns what follows the word "version", such as
// "10.0.2 (Debian 1:10.0.2+ds-2)".
func qemuVersion(ctx context.Context, qemu string) string {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, qemu, "--version").Output()
	if err != nil {
		return "unknown"
	}
	first, _, _ := strings.Cut(string(out), "\n")
	_, version, ok := strings.Cut(first, "version ")
	if !ok {
		return "unknown"
	}
	return version
}

// String is the host in one line.
func (h Host) String() string {
	return formatHost(h)
}
