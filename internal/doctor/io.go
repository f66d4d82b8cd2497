package doctor

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

func (h *Host) writable(path string) bool {
	return unix.Access(filepath.Join(h.Root, path), unix.R_OK|unix.W_OK) == nil
}

func (h *Host) checkNetwork(r *report) {
	if h.Netd != nil {
		path, err := h.Netd()
		if err != nil {
			r.add(Warn, "user mode", "ditto-netd is not found", "put ditto-netd next to ditto, or use --net tap or none")
		} else {
			r.add(OK, "user mode", path, "")
		}
	}
	if h.Tap == nil {
		return
	}
	if err := h.Tap(); err != nil {
		r.add(Warn, "tap", err.Error(), "run as root, or have a tap device made for you: ip tuntap add ditto0 mode tap user $USER vnet_hdr")
		return
	}
	r.add(OK, "tap", "devices can be made", "")
}

func (h *Host) checkDisk(r *report) {
	if h.IOUring == nil {
		return
	}
	err := h.IOUring()
	switch disabled := h.read("proc/sys/kernel/io_uring_disabled"); {
	case err == nil:
		r.add(OK, "io_uring", "yes", "")
	case disabled == "1" || disabled == "2":
		r.add(Warn, "io_uring", fmt.Sprintf("switched off (kernel.io_uring_disabled is %s): disks use threads", disabled), "sysctl kernel.io_uring_disabled=0")
	default:
		r.add(Warn, "io_uring", err.Error()+": disks use threads", "use Linux 5.19 or newer, or a container that allows it")
	}
}

func (h *Host) checkSandbox(r *report) {
	if h.Landlock != nil {
		if abi := h.Landlock(); abi > 0 {
			r.add(OK, "landlock", fmt.Sprintf("version %d", abi), "")
		} else {
			r.add(Warn, "landlock", "no: a guest that breaks out can reach your files", "boot with landlock in lsm=, on Linux 5.13 or newer")
		}
	}
	actions := " " + h.read("proc/sys/kernel/seccomp/actions_avail") + " "
	if strings.Contains(actions, " kill_process ") && strings.Contains(actions, " errno ") {
		r.add(OK, "seccomp", "yes", "")
	} else {
		if r.Err == nil {
			r.Err = errors.New("the kernel lacks seccomp filters")
		}
		r.add(Missing, "seccomp", "the kernel lacks seccomp filters", "use a kernel with CONFIG_SECCOMP_FILTER, or --sandbox=off")
	}
}
