package main

import (
	"os"
	"path/filepath"
	"strings"
)

// maxColdplugPasses bounds the scans: a transport (virtio_pci) makes devices
// on its bus, whose drivers (ACPI button) make input devices.
const maxColdplugPasses = 5

// coldplug loads a module for every device of the given sysfs that asks for
// one, again as long as new devices appear.
func (l *loader) coldplug(sysfs string) []error {
	var errs []error
	seen := map[string]bool{}
	for range maxColdplugPasses {
		fresh := false
		for _, alias := range modaliases(sysfs) {
			if seen[alias] {
				continue
			}
			seen[alias], fresh = true, true
			if _, err := l.load(alias); err != nil {
				errs = append(errs, err)
			}
		}
		if !fresh {
			break
		}
	}
	return errs
}

// modaliases lists the module aliases of the devices a VM has. The cpu bus is
// left out: it repeats one long alias per vCPU that no module here wants.
func modaliases(sysfs string) []string {
	var out []string
	for _, dir := range []string{"bus/pci", "bus/virtio", "bus/acpi", "bus/platform", "class/input"} {
		pattern := filepath.Join(sysfs, dir, "devices/*/modalias")
		if strings.HasPrefix(dir, "class/") {
			pattern = filepath.Join(sysfs, dir, "*/modalias")
		}
		files, _ := filepath.Glob(pattern)
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil {
				if s := strings.TrimSpace(string(b)); s != "" {
					out = append(out, s)
				}
			}
		}
	}
	return out
}
