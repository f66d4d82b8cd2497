package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The power button is an input device (ACPI button driver) that sends
// KEY_POWER through evdev. Events are struct input_event of linux/input.h.
const (
	inputEventLen = 24 // two 8-byte times, type, code, value
	evKey         = 1
	keyPower      = 116
)

// isPowerPress tells whether an input event is the power key going down.
func isPowerPress(ev []byte) bool {
	return len(ev) >= inputEventLen &&
		binary.NativeEndian.Uint16(ev[16:]) == evKey &&
		binary.NativeEndian.Uint16(ev[18:]) == keyPower &&
		binary.NativeEndian.Uint32(ev[20:]) == 1
}

// hasKey reads a capability bitmap of sysfs: hexadecimal words of 64 bits, the
// most significant first.
func hasKey(bitmap string, key int) bool {
	words := strings.Fields(bitmap)
	i := len(words) - 1 - key/64
	if i < 0 {
		return false
	}
	w, err := strconv.ParseUint(words[i], 16, 64)
	return err == nil && w>>(key%64)&1 != 0
}

// powerButtons lists the event devices that have a power key.
func powerButtons(sysfs string) []string {
	files, _ := filepath.Glob(filepath.Join(sysfs, "class/input/event*/device/capabilities/key"))
	var names []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && hasKey(string(b), keyPower) {
			rel, _ := filepath.Rel(filepath.Join(sysfs, "class/input"), f)
			name, _, _ := strings.Cut(rel, string(filepath.Separator))
			names = append(names, name)
		}
	}
	return names
}

// watchButtons sends on pressed when a power button is pushed.
func watchButtons(sysfs, dev string, pressed chan<- struct{}) (watching int, errs []error) {
	for _, name := range powerButtons(sysfs) {
		// O_RDONLY without O_NONBLOCK keeps the file out of the poller; one
		// thread sleeps in read for the life of the guest.
		fd, err := unix.Open(filepath.Join(dev, "input", name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			errs = append(errs, fmt.Errorf("power button %s: %w", name, err))
			continue
		}
		watching++
		go func() {
			buf := make([]byte, 16*inputEventLen)
			for {
				n, err := unix.Read(fd, buf)
				if err == unix.EINTR {
					continue
				}
				if err != nil || n < inputEventLen {
					return
				}
				for ev := buf[:n]; len(ev) >= inputEventLen; ev = ev[inputEventLen:] {
					if isPowerPress(ev) {
						pressed <- struct{}{}
					}
				}
			}
		}()
	}
	return watching, errs
}
