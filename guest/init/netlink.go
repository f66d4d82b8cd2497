package main

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// The few rtnetlink requests a static address takes (man 7 rtnetlink). A
// netlink library would be half of this program.

// attr is one route attribute.
type attr struct {
	kind uint16
	data []byte
}

const (
	nlHeaderLen = 16
	nlRequest   = unix.NLM_F_REQUEST | unix.NLM_F_ACK | unix.NLM_F_CREATE | unix.NLM_F_REPLACE
)

// netlinkRequest lays out a message: header (length, type, flags, sequence,
// port), the fixed part, attributes padded to 4 bytes.
func netlinkRequest(kind, flags uint16, fixed []byte, attrs []attr) []byte {
	msg := make([]byte, nlHeaderLen, 128)
	msg = append(msg, fixed...)
	for _, a := range attrs {
		msg = binary.NativeEndian.AppendUint16(msg, uint16(4+len(a.data)))
		msg = binary.NativeEndian.AppendUint16(msg, a.kind)
		msg = append(msg, a.data...)
		for len(msg)%4 != 0 {
			msg = append(msg, 0)
		}
	}
	binary.NativeEndian.PutUint32(msg[0:], uint32(len(msg)))
	binary.NativeEndian.PutUint16(msg[4:], kind)
	binary.NativeEndian.PutUint16(msg[6:], flags)
	binary.NativeEndian.PutUint32(msg[8:], 1)
	return msg
}

// addrRequest adds an address to an interface: struct ifaddrmsg (family,
// prefix length, flags, scope, index).
func addrRequest(ifIndex int, p netip.Prefix) []byte {
	fixed := []byte{family(p.Addr()), byte(p.Bits()), 0, unix.RT_SCOPE_UNIVERSE}
	fixed = binary.NativeEndian.AppendUint32(fixed, uint32(ifIndex))
	ip := p.Addr().AsSlice()
	return netlinkRequest(unix.RTM_NEWADDR, nlRequest, fixed, []attr{
		{unix.IFA_LOCAL, ip}, {unix.IFA_ADDRESS, ip},
	})
}

// defaultRouteRequest adds a default route: struct rtmsg (family, destination
// and source length, tos, table, protocol, scope, type, flags).
func defaultRouteRequest(ifIndex int, gateway netip.Addr) []byte {
	fixed := []byte{
		family(gateway), 0, 0, 0,
		unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST,
		0, 0, 0, 0,
	}
	return netlinkRequest(unix.RTM_NEWROUTE, nlRequest, fixed, []attr{
		{unix.RTA_GATEWAY, gateway.AsSlice()},
		{unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, uint32(ifIndex))},
	})
}

// linkUpRequest sets IFF_UP: struct ifinfomsg (family, type, index, flags, mask).
func linkUpRequest(ifIndex int) []byte {
	fixed := make([]byte, 4)
	fixed = binary.NativeEndian.AppendUint32(fixed, uint32(ifIndex))
	fixed = binary.NativeEndian.AppendUint32(fixed, unix.IFF_UP)
	fixed = binary.NativeEndian.AppendUint32(fixed, unix.IFF_UP)
	return netlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_REQUEST|unix.NLM_F_ACK, fixed, nil)
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// netlinkDo sends one request and returns the kernel's verdict.
func netlinkDo(msg []byte) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buf := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	if err != nil {
		return err
	}
	return parseAck(buf[:n])
}

// parseAck reads the error number of an NLMSG_ERROR answer; zero is success.
func parseAck(b []byte) error {
	if len(b) < nlHeaderLen+4 || binary.NativeEndian.Uint16(b[4:]) != unix.NLMSG_ERROR {
		return fmt.Errorf("netlink: unexpected answer")
	}
	if code := int32(binary.NativeEndian.Uint32(b[nlHeaderLen:])); code != 0 {
		return unix.Errno(-code)
	}
	return nil
}
