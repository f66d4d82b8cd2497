package config

import (
	"fmt"
	"strings"
)

// Bounds on what a network device is told.
const (
	minMTU = 68 // RFC 791
	maxMTU = 65535
	// maxInterfaceName is IFNAMSIZ less the NUL.
	maxInterfaceName = 15
	// maxSocketPath is the size of sun_path less the NUL.
	maxSocketPath = 107
)

func checkNets(c *Config) error {
	macs := map[string]int{}
	ports := map[string]string{}
	for i, n := range c.Nets {
		field := fmt.Sprintf("nets[%d]", i)
		if err := checkNet(field, n); err != nil {
			return err
		}
		mac, err := n.HardwareAddr(c.Name, i)
		if err != nil {
			return &Error{field + ".mac", n.MAC, err.Error(), ""}
		}
		if j, dup := macs[mac.String()]; dup {
			return &Error{field + ".mac", mac.String(), fmt.Sprintf("is the address of nets[%d]", j), "give each device its own, or none"}
		}
		macs[mac.String()] = i
		for k, f := range n.Forwards {
			at := fmt.Sprintf("%s.forwards[%d]", field, k)
			if f.HostPort == 0 || f.GuestPort == 0 {
				return &Error{at, f.String(), "port 0", "use ports from 1 to 65535"}
			}
			key := f.Protocol + " " + f.Listen()
			if other, dup := ports[key]; dup {
				return &Error{at, f.String(), "the host port is taken by " + other, "use another host port"}
			}
			ports[key] = at
		}
	}
	return nil
}

func checkNet(field string, n Net) error {
	if n.Mode < NetUser || n.Mode > NetNone {
		return &Error{field + ".mode", n.Mode.String(), "unknown network", "use " + orList(netModeNames())}
	}
	for _, option := range []struct {
		name, value string
		mode        NetMode
	}{
		{"tap", n.Tap, NetTap}, {"bridge", n.Bridge, NetTap}, {"path", n.Path, NetSocket},
	} {
		if option.value != "" && option.mode != n.Mode {
			return &Error{field + "." + option.name, option.value, "has no meaning for mode " + n.Mode.String(), "use mode " + option.mode.String()}
		}
	}
	for _, option := range []struct{ name, value string }{{"tap", n.Tap}, {"bridge", n.Bridge}} {
		if !validInterface(option.value) {
			return &Error{field + "." + option.name, option.value, "not an interface name", fmt.Sprintf("use up to %d characters without slash, colon or space", maxInterfaceName)}
		}
	}
	switch {
	case len(n.Forwards) > 0 && n.Mode != NetUser:
		return &Error{field + ".forwards", n.Forwards[0].String(), "has no meaning for mode " + n.Mode.String(), "use mode user"}
	case n.Mode == NetSocket && n.Path == "":
		return &Error{field + ".path", "", "missing", "name the unix socket of the peer, as in --net socket,path=/run/passt.socket"}
	case len(n.Path) > maxSocketPath || strings.ContainsRune(n.Path, 0):
		return &Error{field + ".path", n.Path, "not a socket path", fmt.Sprintf("use at most %d bytes", maxSocketPath)}
	case n.MTU != 0 && (n.MTU < minMTU || n.MTU > maxMTU):
		return &Error{field + ".mtu", fmt.Sprint(n.MTU), "out of range", fmt.Sprintf("use %d to %d", minMTU, maxMTU)}
	}
	return nil
}

func validInterface(name string) bool {
	if len(name) > maxInterfaceName || name == "." || name == ".." {
		return false
	}
	return strings.IndexFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' || r == ':' }) < 0
}
