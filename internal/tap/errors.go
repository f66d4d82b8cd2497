package tap

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// deviceError says why /dev/net/tun does not open, and the cure.
func deviceError(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("this host has no %s: load the module with 'modprobe tun', or use --net user: %w", device, err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("no permission to open %s: ask for access to it, or use --net user: %w", device, err)
	}
	return fmt.Errorf("open %s: %w", device, err)
}

// attachError says why TUNSETIFF fails, and the cure.
func attachError(name string, err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("no permission for tap %s: run as root, or have one prepared with "+
			"'ip tuntap add NAME mode tap vnet_hdr user YOU' and 'ip link set NAME up' and name it, or use --net user: %w", name, err)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("tap %s is in use by another program: choose another name: %w", name, err)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("interface %s exists and is not a plain tap (it may be a tun, multi-queue or another kind): choose another name: %w", name, err)
	}
	return fmt.Errorf("tap %s: %w", name, err)
}

// configureError says why a change of the interface fails, and the cure. what
// is the change as the ip command writes it.
func configureError(err error, name, what string) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("no permission to change tap %s: run as root, or have 'ip link set %s %s' run before: %w", name, name, what, err)
	}
	return fmt.Errorf("ip link set %s %s: %w", name, what, err)
}
