package netd

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
)

// The values that a [Config] has unless told otherwise. Nothing of the virtual
// network leaves the process as frames, so packets may be as long as they can:
// that makes TCP two to three times as fast as 1500 bytes do.
const (
	DefaultSubnet = "192.168.127.0/24"
	DefaultMTU    = MaxMTU
)

// MTU limits in bytes. Below 576 DHCP does not fit; above 65520 a frame with
// its Ethernet header exceeds what virtio-net carries without segmentation.
const (
	MinMTU = 576
	MaxMTU = 65520
)

// Config is what ditto-netd is told on its command line.
type Config struct {
	// FD is the inherited stream socket. [Start] sets it.
	FD int
	// Listen is the path of a unix socket to create instead; the first peer
	// is served and the path is removed.
	Listen string
	// StatusFD is where the status line goes. [Start] sets it.
	StatusFD int
	// MAC is the guest's address. With it the guest always gets
	// [Addresses.Guest] by DHCP.
	MAC net.HardwareAddr
	// Subnet is the guest's IPv4 network, between /8 and /29.
	Subnet netip.Prefix
	// MTU of the virtual network in bytes.
	MTU int
	// Forwards are the guest's ports reachable from the host.
	Forwards []Forward
	// NoSandbox leaves the process its rights, to debug it.
	NoSandbox bool
	// Verbose logs what the network stack complains about.
	Verbose bool
}

// Addresses are the fixed points of the virtual network.
type Addresses struct {
	// Gateway is the router, DHCP and DNS server: the first address.
	Gateway netip.Addr `json:"gateway"`
	// Guest is the lease of the guest's MAC: the second address.
	Guest netip.Addr `json:"guest"`
	// Host stands for the host's loopback: the last address. What listens
	// on 127.0.0.1 of the host answers there.
	Host netip.Addr `json:"host"`
}

// SubnetOf returns the network for a guest's i-th user-mode network: the default
// for the first, its neighbours for the others, so that their routes differ.
func SubnetOf(i int) netip.Prefix {
	const first = 127 // of DefaultSubnet
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, byte(first + i), 0}), 24)
}

// AddressesOf returns the fixed points of subnet.
func AddressesOf(subnet netip.Prefix) (Addresses, error) {
	if !subnet.Addr().Is4() || subnet.Bits() < 8 || subnet.Bits() > 29 || subnet != subnet.Masked() {
		return Addresses{}, fmt.Errorf("subnet %s: use an IPv4 network between /8 and /29, as %s", subnet, DefaultSubnet)
	}
	gateway := subnet.Addr().Next()
	last := subnet.Addr().As4()
	for bit := subnet.Bits(); bit < 31; bit++ {
		last[bit/8] |= 0x80 >> (bit % 8) // all host bits but the lowest: the address below broadcast
	}
	return Addresses{Gateway: gateway, Guest: gateway.Next(), Host: netip.AddrFrom4(last)}, nil
}

// Args returns the command line that [ParseArgs] turns back into c.
func (c Config) Args() []string {
	args := []string{"--fd", strconv.Itoa(c.FD), "--status-fd", strconv.Itoa(c.StatusFD)}
	if c.Listen != "" {
		args = []string{"--listen", c.Listen, "--status-fd", strconv.Itoa(c.StatusFD)}
	}
	if c.MAC != nil {
		args = append(args, "--mac", c.MAC.String())
	}
	if c.Subnet.IsValid() {
		args = append(args, "--subnet", c.Subnet.String())
	}
	if c.MTU != 0 {
		args = append(args, "--mtu", strconv.Itoa(c.MTU))
	}
	for _, f := range c.Forwards {
		args = append(args, "--forward", f.String())
	}
	if c.NoSandbox {
		args = append(args, "--sandbox=off")
	}
	if c.Verbose {
		args = append(args, "--verbose")
	}
	return args
}

// ParseArgs reads ditto-netd's command line. Usage goes to out when it is
// asked for, in which case the error is [flag.ErrHelp].
func ParseArgs(args []string, out io.Writer) (Config, error) {
	c := Config{FD: -1, StatusFD: 1, MTU: DefaultMTU, Subnet: netip.MustParsePrefix(DefaultSubnet)}
	flags := flag.NewFlagSet("ditto-netd", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.IntVar(&c.FD, "fd", c.FD, "inherited stream socket to the VM")
	flags.StringVar(&c.Listen, "listen", "", "unix socket `path` to create; serves the first peer")
	flags.IntVar(&c.StatusFD, "status-fd", c.StatusFD, "where to write the status line")
	flags.Func("mac", "the guest's MAC `address`; it gets the subnet's second address", func(s string) (err error) {
		c.MAC, err = net.ParseMAC(s)
		if err == nil && (len(c.MAC) != 6 || c.MAC[0]&1 != 0) {
			return errors.New("not a unicast Ethernet address")
		}
		return err
	})
	flags.Func("subnet", "the guest's IPv4 `network` (default "+DefaultSubnet+")", func(s string) (err error) {
		if c.Subnet, err = netip.ParsePrefix(s); err == nil {
			_, err = AddressesOf(c.Subnet)
		}
		return err
	})
	flags.IntVar(&c.MTU, "mtu", c.MTU, "MTU in bytes")
	flags.Func("forward", "`[HOSTIP:]HOSTPORT:GUESTPORT[/tcp|/udp]`, may be repeated", func(s string) error {
		f, err := ParseForward(s)
		if err == nil {
			c.Forwards = append(c.Forwards, f)
			err = CheckForwards(c.Forwards)
		}
		return err
	})
	flags.Func("sandbox", "`on|off` (default on)", func(s string) error {
		if s != "on" && s != "off" {
			return errors.New("use on or off")
		}
		c.NoSandbox = s == "off"
		return nil
	})
	flags.BoolVar(&c.Verbose, "verbose", false, "log what the network stack complains about")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			flags.SetOutput(out)
			_, _ = fmt.Fprintln(out, "usage: ditto-netd (--fd N | --listen PATH) [flags]")
			flags.PrintDefaults()
		}
		return Config{}, err
	}
	switch {
	case flags.NArg() > 0:
		return Config{}, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case (c.FD >= 0) == (c.Listen != ""):
		return Config{}, errors.New("give either --fd or --listen")
	case c.MTU < MinMTU || c.MTU > MaxMTU:
		return Config{}, fmt.Errorf("mtu %d: use %d to %d", c.MTU, MinMTU, MaxMTU)
	}
	return c, nil
}
