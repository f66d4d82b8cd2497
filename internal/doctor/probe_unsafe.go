package doctor

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"ditto.vm/memory"
	"ditto.vm/vmm/kvm"
	"ditto.vm/vmm/sandbox"
)

// ThisHost returns the host that the program runs on. netd finds ditto-netd.
func ThisHost(netd func() (string, error)) *Host {
	return &Host{
		Root: "/",
		UID:  os.Getuid(),
		KVM: func() (KVM, error) {
			system, err := kvm.Open()
			if err != nil {
				return nil, err
			}
			return system, nil
		},
		WPAsync:  probeWPAsync,
		IOUring:  probeIOUring,
		Landlock: sandbox.LandlockABI,
		Tap:      probeTap,
		Netd:     netd,
		Limit:    limits,
	}
}

func probeWPAsync() error {
	found, err := memory.ProbeTrackers(memory.TrackerHost{})
	if err != nil {
		return err
	}
	return found[memory.TrackerWPAsync]
}

func limits() (locked, files uint64) {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l) == nil {
		locked = l.Cur
	}
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) == nil {
		files = l.Cur
	}
	return locked, files
}

// ioUringParams is the size of struct io_uring_params (linux/io_uring.h).
const ioUringParams = 120

// probeIOUring makes a ring of one entry and closes it.
func probeIOUring() error {
	var params [ioUringParams]byte
	// SAFETY: the kernel reads and fills the 120 bytes during the call.
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return fmt.Errorf("io_uring_setup: %w", errno)
	}
	return unix.Close(int(fd))
}

// probeTap makes a tap device with a name that the kernel chooses. It is gone
// when its descriptor is closed.
func probeTap() error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("/dev/net/tun: %w", err)
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("dittodoc%d")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return fmt.Errorf("TUNSETIFF: %w", err)
	}
	return nil
}
