package config

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net"
	"strconv"
	"strings"
)

// Net is one virtio network device.
type Net struct {
	Mode NetMode `json:"mode"`
	// Tap is the name of the tap device, created if it does not exist. Empty
	// lets the kernel choose.
	Tap string `json:"tap,omitempty"`
	// Bridge is the bridge that the tap device joins.
	Bridge string `json:"bridge,omitempty"`
	// MAC is the guest's address. Empty derives one from the machine's name
	// and the position of the device, the same every time.
	MAC string `json:"mac,omitempty"`
	// Forwards are the host ports that lead to guest ports (mode user).
	Forwards []Forward `json:"forwards,omitempty"`
	// Path is the unix stream socket to connect to (mode socket).
	Path string `json:"path,omitempty"`
	// MTU is told to the guest in bytes. 0 means 1500, and the longest there
	// is on a user-mode network, which TCP likes.
	MTU int `json:"mtu,omitempty"`
}

// ParseNet reads the value of --net: MODE[,KEY=VALUE...].
func ParseNet(value string) (Net, error) {
	var n Net
	items := splitOptions(value)
	if err := n.Mode.UnmarshalText([]byte(items[0])); err != nil {
		return Net{}, fmt.Errorf("net %q: %w", value, err)
	}
	for _, item := range items[1:] {
		key, arg, _ := strings.Cut(item, "=")
		var err error
		switch key {
		case "tap", "name":
			n.Tap = arg
		case "bridge":
			n.Bridge = arg
		case "mac":
			n.MAC = arg
		case "path":
			n.Path = arg
		case "mtu":
			n.MTU, err = strconv.Atoi(arg)
			if err != nil {
				err = fmt.Errorf("%q is not a number", arg)
			}
		case "forward":
			var f Forward
			err = f.UnmarshalText([]byte(arg))
			n.Forwards = append(n.Forwards, f)
		default:
			err = fmt.Errorf("unknown option: use tap=, bridge=, mac=, path=, mtu= or forward=")
		}
		if err != nil {
			return Net{}, fmt.Errorf("net %q: %s: %w", value, key, err)
		}
	}
	return n, nil
}

// HardwareAddr returns the device's MAC: the configured one, or one derived
// from the machine's name and the device's index. Derived addresses are
// unicast and locally administered (IEEE 802-2014 8.2).
func (n Net) HardwareAddr(name string, index int) (net.HardwareAddr, error) {
	if n.MAC != "" {
		return parseMAC(n.MAC)
	}
	h := sha256.New()
	h.Write([]byte("ditto mac\x00" + name + "\x00"))
	var position [8]byte
	binary.LittleEndian.PutUint64(position[:], uint64(index))
	h.Write(position[:])
	mac := net.HardwareAddr(h.Sum(nil)[:6])
	mac[0] = mac[0]&^0x01 | 0x02
	return mac, nil
}

// parseMAC accepts 48-bit unicast addresses only.
func parseMAC(s string) (net.HardwareAddr, error) {
	mac, err := net.ParseMAC(s)
	switch {
	case err != nil || len(mac) != 6:
		return nil, fmt.Errorf("not a MAC address: write six bytes, as in 52:54:00:12:34:56")
	case mac[0]&1 != 0:
		return nil, fmt.Errorf("a multicast address: the first byte must be even")
	case mac.String() == "00:00:00:00:00:00":
		return nil, fmt.Errorf("the null address: leave it out to get a stable one")
	}
	return mac, nil
}

// Forward leads a port of the host to a port of the guest. In text it is
// [HOSTIP:]HOSTPORT:GUESTPORT[/tcp|/udp], the form container tools use.
type Forward struct {
	// Protocol is tcp or udp.
	Protocol string
	// HostIP is the address that is listened on. Empty means 127.0.0.1: a
	// guest is not exposed to the network unless that was said.
	HostIP    string
	HostPort  uint16
	GuestPort uint16
}

// Listen returns the host address to listen on, HOST:PORT.
func (f Forward) Listen() string {
	ip := f.HostIP
	if ip == "" {
		ip = "127.0.0.1"
	}
	return net.JoinHostPort(ip, strconv.Itoa(int(f.HostPort)))
}

// String returns the text form.
func (f Forward) String() string {
	s := fmt.Sprintf("%d:%d", f.HostPort, f.GuestPort)
	switch {
	case strings.Contains(f.HostIP, ":"):
		s = "[" + f.HostIP + "]:" + s
	case f.HostIP != "":
		s = f.HostIP + ":" + s
	}
	if f.Protocol == "udp" {
		s += "/udp"
	}
	return s
}

// MarshalText implements encoding.TextMarshaler.
func (f Forward) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (f *Forward) UnmarshalText(text []byte) error {
	bad := func(problem string) error {
		return fmt.Errorf("%q: %s: write [HOSTIP:]HOSTPORT:GUESTPORT[/tcp|/udp], as in 8080:80", text, problem)
	}
	ports, protocol, found := strings.Cut(string(text), "/")
	if !found {
		protocol = "tcp"
	}
	if protocol != "tcp" && protocol != "udp" {
		return bad("unknown protocol")
	}
	host, guest, found := cutLast(ports)
	if !found {
		return bad("no guest port")
	}
	ip, port, found := cutLast(host)
	if !found {
		ip, port = "", host
	}
	if strings.HasPrefix(ip, "[") && strings.HasSuffix(ip, "]") {
		ip = ip[1 : len(ip)-1]
	} else if strings.Contains(ip, ":") {
		return bad("an IPv6 address needs brackets")
	}
	if found && net.ParseIP(ip) == nil {
		return bad("not an IP address")
	}
	hostPort, err := parsePort(port)
	if err != nil {
		return bad("host port: " + err.Error())
	}
	guestPort, err := parsePort(guest)
	if err != nil {
		return bad("guest port: " + err.Error())
	}
	*f = Forward{Protocol: protocol, HostIP: ip, HostPort: hostPort, GuestPort: guestPort}
	return nil
}

func cutLast(s string) (before, after string, found bool) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

func parsePort(s string) (uint16, error) {
	port, err := strconv.ParseUint(s, 10, 16)
	if err != nil || port == 0 {
		return 0, fmt.Errorf("%q is not a port between 1 and 65535", s)
	}
	return uint16(port), nil
}
