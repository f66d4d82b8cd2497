package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// testTimeout bounds every wait of the tests; nothing is expected to come near.
const testTimeout = 30 * time.Second

// guestMAC is the address of the guest in the tests.
var guestMAC = net.HardwareAddr{0x52, 0x54, 0x00, 0x12, 0x34, 0x56}

// guest is the far end of the socket: a TCP/IP stack that speaks to
// ditto-netd as a kernel in a VM would.
type guest struct {
	t     *testing.T
	conn  net.Conn
	link  *channel.Endpoint
	stack *stack.Stack
	lease *dhcpv4.DHCPv4
}

// newGuest gets an address by DHCP over conn and configures a stack with it.
func newGuest(t *testing.T, conn net.Conn) *guest {
	t.Helper()
	g := &guest{t: t, conn: conn}
	in := bufio.NewReader(conn)
	g.lease = g.dhcp(in)
	g.link = channel.New(256, 1500+header.EthernetMinimumSize, tcpip.LinkAddress(guestMAC))
	g.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})
	if err := g.stack.CreateNIC(1, ethernet.New(g.link)); err != nil {
		t.Fatalf("create NIC: %v", err)
	}
	ones, _ := g.lease.SubnetMask().Size()
	address := tcpip.AddrFromSlice(g.lease.YourIPAddr.To4())
	err := g.stack.AddProtocolAddress(1, tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: address, PrefixLen: ones},
	}, stack.AddressProperties{})
	if err != nil {
		t.Fatalf("add address: %v", err)
	}
	g.stack.SetRouteTable([]tcpip.Route{
		{Destination: tcpip.AddressWithPrefix{Address: address, PrefixLen: ones}.Subnet(), NIC: 1},
		{Destination: header.IPv4EmptySubnet, Gateway: tcpip.AddrFromSlice(g.lease.Router()[0].To4()), NIC: 1},
	})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { g.send(ctx) })
	wg.Go(func() { g.receive(in) })
	t.Cleanup(func() {
		cancel()
		_ = conn.Close()
		wg.Wait()
		g.stack.Close()
		g.stack.Wait()
	})
	return g
}

// send takes frames from the stack to the socket.
func (g *guest) send(ctx context.Context) {
	for {
		packet := g.link.ReadContext(ctx)
		if packet == nil {
			return
		}
		view := packet.ToView()
		_, err := g.conn.Write(framed(view.AsSlice()))
		view.Release()
		packet.DecRef()
		if err != nil {
			return
		}
	}
}

// receive takes frames from the socket to the stack.
func (g *guest) receive(in *bufio.Reader) {
	for {
		frame, err := readFrame(in)
		if err != nil {
			return
		}
		packet := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
		g.link.InjectInbound(0, packet)
		packet.DecRef()
	}
}

// dhcp runs DISCOVER, OFFER, REQUEST, ACK in raw frames, before there is an
// address, and returns the acknowledgement.
func (g *guest) dhcp(in *bufio.Reader) *dhcpv4.DHCPv4 {
	g.t.Helper()
	discover, err := dhcpv4.NewDiscovery(guestMAC)
	if err != nil {
		g.t.Fatal(err)
	}
	offer := g.dhcpExchange(in, discover, dhcpv4.MessageTypeOffer)
	request, err := dhcpv4.NewRequestFromOffer(offer)
	if err != nil {
		g.t.Fatal(err)
	}
	return g.dhcpExchange(in, request, dhcpv4.MessageTypeAck)
}

func (g *guest) dhcpExchange(in *bufio.Reader, m *dhcpv4.DHCPv4, want dhcpv4.MessageType) *dhcpv4.DHCPv4 {
	g.t.Helper()
	if _, err := g.conn.Write(framed(dhcpFrame(m.ToBytes()))); err != nil {
		g.t.Fatalf("send DHCP: %v", err)
	}
	_ = g.conn.SetReadDeadline(time.Now().Add(testTimeout))
	defer func() { _ = g.conn.SetReadDeadline(time.Time{}) }()
	for {
		frame, err := readFrame(in)
		if err != nil {
			g.t.Fatalf("wait for DHCP %v: %v", want, err)
		}
		const headers = header.EthernetMinimumSize + header.IPv4MinimumSize + header.UDPMinimumSize
		if len(frame) < headers || header.Ethernet(frame).Type() != header.IPv4ProtocolNumber {
			continue
		}
		reply, err := dhcpv4.FromBytes(frame[headers:])
		if err == nil && reply.TransactionID == m.TransactionID && reply.MessageType() == want {
			return reply
		}
	}
}

// dhcpFrame wraps a client's message: 0.0.0.0:68 to 255.255.255.255:67.
func dhcpFrame(payload []byte) []byte {
	frame := make([]byte, header.EthernetMinimumSize+header.IPv4MinimumSize+header.UDPMinimumSize+len(payload))
	eth := header.Ethernet(frame)
	eth.Encode(&header.EthernetFields{
		SrcAddr: tcpip.LinkAddress(guestMAC), DstAddr: header.EthernetBroadcastAddress, Type: header.IPv4ProtocolNumber,
	})
	ip := header.IPv4(frame[header.EthernetMinimumSize:])
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(ip)), TTL: 64, Protocol: uint8(header.UDPProtocolNumber),
		SrcAddr: header.IPv4Any, DstAddr: header.IPv4Broadcast,
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	datagram := header.UDP(ip.Payload())
	datagram.Encode(&header.UDPFields{SrcPort: 68, DstPort: 67, Length: uint16(len(datagram))})
	copy(datagram.Payload(), payload)
	sum := header.PseudoHeaderChecksum(header.UDPProtocolNumber, header.IPv4Any, header.IPv4Broadcast, uint16(len(datagram)))
	datagram.SetChecksum(^datagram.CalculateChecksum(checksum.Checksum(payload, sum)))
	return frame
}

// framed puts the length before a frame.
func framed(frame []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...)
}

// readFrame reads one frame and its length.
func readFrame(r io.Reader) ([]byte, error) {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	frame := make([]byte, binary.BigEndian.Uint32(length[:]))
	_, err := io.ReadFull(r, frame)
	return frame, err
}

// dial connects from inside the guest.
func (g *guest) dial(ctx context.Context, network, address string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	full := tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFromSlice(to.Addr().AsSlice()), Port: to.Port()}
	if network[:3] == "udp" {
		return gonet.DialUDP(g.stack, nil, &full, ipv4.ProtocolNumber)
	}
	return gonet.DialContextTCP(ctx, g.stack, full, ipv4.ProtocolNumber)
}
