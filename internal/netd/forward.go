package netd

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
)

// Forward makes a port of the guest reachable at an address of the host.
type Forward struct {
	// Proto is "tcp" or "udp".
	Proto string
	// Host is where ditto-netd listens. Port 0 takes any free TCP port; the
	// status line says which.
	Host netip.AddrPort
	// GuestPort is the port on the guest's own address.
	GuestPort uint16
}

// ParseForward reads "[HOSTIP:]HOSTPORT:GUESTPORT[/tcp|/udp]". HOSTIP is
// 127.0.0.1 unless given, an IPv6 address stands in brackets, and the protocol
// is tcp unless given.
func ParseForward(s string) (Forward, error) {
	fail := func(what string) (Forward, error) {
		return Forward{}, fmt.Errorf("forward %q: %s: use [HOSTIP:]HOSTPORT:GUESTPORT[/tcp|/udp]", s, what)
	}
	rest, proto, found := strings.Cut(s, "/")
	if !found {
		proto = "tcp"
	}
	if proto != "tcp" && proto != "udp" {
		return fail(fmt.Sprintf("unknown protocol %q", proto))
	}
	i := strings.LastIndexByte(rest, ':')
	if i < 0 {
		return fail("no guest port")
	}
	guest, err := parsePort(rest[i+1:])
	if err != nil || guest == 0 {
		return fail(fmt.Sprintf("bad guest port %q", rest[i+1:]))
	}
	ip, port := "127.0.0.1", rest[:i]
	if j := strings.LastIndexByte(port, ':'); j >= 0 {
		ip, port = port[:j], port[j+1:]
	}
	addr, err := parseHostIP(ip)
	if err != nil {
		return fail(fmt.Sprintf("bad host address %q", ip))
	}
	host, err := parsePort(port)
	if err != nil {
		return fail(fmt.Sprintf("bad host port %q", port))
	}
	if proto == "udp" && host == 0 {
		return fail("a udp forward needs a host port")
	}
	return Forward{Proto: proto, Host: netip.AddrPortFrom(addr, host), GuestPort: guest}, nil
}

// CheckForwards refuses two forwards of one host port.
func CheckForwards(forwards []Forward) error {
	type listener struct {
		proto string
		host  netip.AddrPort
	}
	seen := make(map[listener]Forward)
	for _, f := range forwards {
		at := listener{f.Proto, f.Host}
		if other, taken := seen[at]; taken && f.Host.Port() != 0 {
			return fmt.Errorf("forwards %s and %s use the same host port: choose another for one of them", other, f)
		}
		seen[at] = f
	}
	return nil
}

// String returns the form that [ParseForward] reads.
func (f Forward) String() string {
	return fmt.Sprintf("%s:%d/%s", f.Host, f.GuestPort, f.Proto)
}

// parseHostIP reads a literal address; IPv6 stands in brackets.
func parseHostIP(s string) (netip.Addr, error) {
	bare, bracketed := strings.CutPrefix(s, "[")
	if bracketed {
		var closed bool
		if bare, closed = strings.CutSuffix(bare, "]"); !closed {
			return netip.Addr{}, errors.New("bracket is not closed")
		}
	}
	addr, err := netip.ParseAddr(bare)
	if err != nil {
		return netip.Addr{}, err
	}
	if addr.Is4() == bracketed {
		return netip.Addr{}, errors.New("brackets go around IPv6 addresses only")
	}
	return addr, nil
}

// parsePort reads a decimal port without sign or leading zeros.
func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0, err
	}
	if strconv.FormatUint(n, 10) != s {
		return 0, errors.New("not in canonical form")
	}
	return uint16(n), nil
}

// ProbeForwards opens and closes the host port of every forward. The error is
// a [*StartError].
func ProbeForwards(forwards []Forward) error {
	for _, f := range forwards {
		var c io.Closer
		var err error
		if f.Proto == "udp" {
			c, err = net.ListenPacket("udp", f.Host.String())
		} else {
			c, err = net.Listen("tcp", f.Host.String())
		}
		if err != nil {
			return ListenError(f, err)
		}
		_ = c.Close()
	}
	return nil
}

// ListenError says why a forward's host port does not open, and what to do.
func ListenError(f Forward, err error) *StartError {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return &StartError{Code: ExitPortBusy, Text: fmt.Sprintf(
			"forward %s: %s port %d of %s is already in use: choose another host port", f, f.Proto, f.Host.Port(), f.Host.Addr())}
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return &StartError{Code: ExitPortDeny, Text: fmt.Sprintf(
			"forward %s: no permission for %s port %d: choose a host port from 1024 up", f, f.Proto, f.Host.Port())}
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return &StartError{Code: ExitPortDeny, Text: fmt.Sprintf(
			"forward %s: this host has no address %s: use 127.0.0.1, 0.0.0.0 or one it has", f, f.Host.Addr())}
	}
	return &StartError{Code: ExitFailure, Text: fmt.Sprintf("forward %s: %v", f, err)}
}
