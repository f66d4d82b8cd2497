package tap

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// HeaderSize is the length in bytes of the struct virtio_net_hdr_v1 before
// each frame (TUNSETVNETHDRSZ).
const HeaderSize = 12

// Config says which interface to open.
type Config struct {
	// Name of the interface, created when there is none. Empty lets the
	// kernel choose "ditto0", "ditto1" and so on.
	Name string
	// Bridge to join, or empty.
	Bridge string
	// MTU in bytes, or 0 to leave it as it is.
	MTU int
}

// Tap is an open interface.
type Tap struct {
	// FD does not block, is closed on exec, and carries frames with a
	// struct virtio_net_hdr_v1 before each.
	FD int
	// Name of the interface.
	Name string
	// MTU of the interface in bytes.
	MTU int
}

// device is the character device behind taps.
const device = "/dev/net/tun"

// Open opens or creates the interface, sets it up and returns its descriptor.
// The errors say what to do when a right or a module is missing.
func Open(config Config) (*Tap, error) {
	if len(config.Name) >= unix.IFNAMSIZ {
		return nil, fmt.Errorf("tap name %q is longer than %d bytes", config.Name, unix.IFNAMSIZ-1)
	}
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, deviceError(err)
	}
	t, err := attach(fd, config)
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return t, nil
}

// attach ties fd to the interface and configures it.
func attach(fd int, config Config) (*Tap, error) {
	pattern := config.Name
	if pattern == "" {
		pattern = "ditto%d"
	}
	request, err := unix.NewIfreq(pattern)
	if err != nil {
		return nil, fmt.Errorf("tap name %q: %w", pattern, err)
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return nil, attachError(pattern, err)
	}
	t := &Tap{FD: fd, Name: request.Name()}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, HeaderSize); err != nil {
		return nil, fmt.Errorf("tap %s: set the header size: %w", t.Name, err)
	}
	link, err := netlink.LinkByName(t.Name)
	if err != nil {
		return nil, fmt.Errorf("tap %s: %w", t.Name, err)
	}
	if err := configure(link, config); err != nil {
		return nil, err
	}
	t.MTU = link.Attrs().MTU
	if config.MTU != 0 {
		t.MTU = config.MTU
	}
	return t, nil
}

// configure sets MTU, bridge and state, each only when it is not so already:
// an interface that an administrator prepared needs no rights.
func configure(link netlink.Link, config Config) error {
	attrs := link.Attrs()
	if config.MTU != 0 && attrs.MTU != config.MTU {
		if err := netlink.LinkSetMTU(link, config.MTU); err != nil {
			return configureError(err, attrs.Name, fmt.Sprintf("mtu %d", config.MTU))
		}
	}
	if config.Bridge != "" {
		if err := join(link, config.Bridge); err != nil {
			return err
		}
	}
	if attrs.Flags&unix.IFF_UP == 0 {
		if err := netlink.LinkSetUp(link); err != nil {
			return configureError(err, attrs.Name, "up")
		}
	}
	return nil
}

// join makes the bridge the interface's master.
func join(link netlink.Link, name string) error {
	bridge, err := netlink.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return fmt.Errorf("there is no bridge %s: create it with 'ip link add %s type bridge' and 'ip link set %s up'", name, name, name)
	}
	if err != nil {
		return fmt.Errorf("bridge %s: %w", name, err)
	}
	if bridge.Type() != "bridge" {
		return fmt.Errorf("%s is a %s interface, not a bridge", name, bridge.Type())
	}
	attrs := link.Attrs()
	if attrs.MasterIndex == bridge.Attrs().Index {
		return nil
	}
	if err := netlink.LinkSetMaster(link, bridge); err != nil {
		return configureError(err, attrs.Name, "master "+name)
	}
	return nil
}
