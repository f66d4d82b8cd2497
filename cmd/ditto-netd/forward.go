package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/containers/gvisor-tap-vsock/pkg/virtualnetwork"
	"github.com/inetaf/tcpproxy"

	"ditto.vm/internal/netd"
)

// forward is one TCP port of the host that listens for the guest.
type forward struct {
	netd.Forward // with the port that was chosen
	listener     net.Listener
}

type forwardSet []forward

// listenTCP opens every host port of the TCP forwards before anything else is
// set up. The error is a [*netd.StartError]. UDP ports are opened by the
// network stack ([udpForwards]).
func listenTCP(wanted []netd.Forward) (forwardSet, error) {
	var set forwardSet
	for _, want := range wanted {
		if want.Proto != "tcp" {
			continue
		}
		listener, err := net.Listen("tcp", want.Host.String())
		if err != nil {
			set.close()
			return nil, netd.ListenError(want, err)
		}
		want.Host = netip.AddrPortFrom(want.Host.Addr(), listener.Addr().(*net.TCPAddr).AddrPort().Port())
		set = append(set, forward{Forward: want, listener: listener})
	}
	return set, nil
}

// udpForwards returns the UDP forwards in the form of the network stack's
// configuration.
func udpForwards(wanted []netd.Forward, guest netip.Addr) map[string]string {
	forwards := make(map[string]string)
	for _, want := range wanted {
		if want.Proto == "udp" {
			forwards["udp:"+want.Host.String()] = netip.AddrPortFrom(guest, want.GuestPort).String()
		}
	}
	return forwards
}

// udpError returns the [*netd.StartError] of the UDP forward that the network
// stack could not open, or nil when err is about something else.
func udpError(wanted []netd.Forward, err error) error {
	var op *net.OpError
	if !errors.As(err, &op) || op.Addr == nil {
		return nil
	}
	for _, want := range wanted {
		if want.Proto == "udp" && op.Addr.String() == want.Host.String() {
			return netd.ListenError(want, err)
		}
	}
	return nil
}

// close stops listening. Connections that are open live on.
func (s forwardSet) close() {
	for _, f := range s {
		_ = f.listener.Close()
	}
}

// serve starts to pass connections on to the guest. It ends with close.
func (s forwardSet) serve(network *virtualnetwork.VirtualNetwork, guest netip.Addr, log *slog.Logger) {
	for _, f := range s {
		go serveTCP(f.listener, network, netip.AddrPortFrom(guest, f.GuestPort).String(), log)
	}
}

// acceptBackoff is how long a listener rests after an error such as having no
// descriptors left.
const acceptBackoff = 100 * time.Millisecond

// serveTCP passes each connection of listener to target in the guest.
func serveTCP(listener net.Listener, network *virtualnetwork.VirtualNetwork, target string, log *slog.Logger) {
	proxy := &tcpproxy.DialProxy{
		Addr: target,
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			return network.DialContextTCP(ctx, addr)
		},
		OnDialError: func(conn net.Conn, err error) {
			log.Debug("the guest refuses a forwarded connection", "target", target, "err", err)
			_ = conn.Close()
		},
	}
	for {
		conn, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			log.Debug("cannot accept a forwarded connection", "target", target, "err", err)
			time.Sleep(acceptBackoff)
			continue
		}
		go proxy.HandleConn(conn)
	}
}
