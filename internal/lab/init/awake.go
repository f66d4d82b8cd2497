package main

import (
	"fmt"
	"io"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/lab/wire"
)

// stayAwake interrupts every CPU at each tick of the host's (see [wire.TickPort]):
//
//	port's interrupt -> reader on any CPU -> eventfd -> sleeper on CPU 0
//	                                      -> eventfd -> sleeper on CPU 1 ...
//
// The port interrupts one CPU only. To wake a sleeper on another one that is
// halted the kernel sends it an interrupt too.
func stayAwake() error {
	ports, err := findPorts(wire.TickPort)
	if err != nil {
		return err
	}
	var wake []int
	for cpu := range runtime.NumCPU() {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			return fmt.Errorf("eventfd: %w", err)
		}
		wake = append(wake, fd)
		go sleeper(cpu, fd)
	}
	for _, path := range ports {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		go spread(f, wake)
	}
	return nil
}

// spread passes ticks on until their stream ends.
func spread(ticks io.Reader, wake []int) {
	one := [8]byte{1}
	var buf [64]byte
	for {
		if _, err := ticks.Read(buf[:]); err != nil {
			return
		}
		for _, fd := range wake {
			_, _ = unix.Write(fd, one[:]) // blocks at 2^64 unread ticks only
		}
	}
}

// sleeper is woken on one CPU again and again, and does nothing.
func sleeper(cpu, fd int) {
	runtime.LockOSThread()
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		fmt.Fprintf(os.Stderr, "lab agent: ticks do not reach CPU %d: %v\n", cpu, err)
		return
	}
	var buf [8]byte
	for {
		if _, err := unix.Read(fd, buf[:]); err != nil && err != unix.EINTR {
			return
		}
	}
}
