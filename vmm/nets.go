package vmm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	virtionet "ditto.vm/devices/virtio/net"
	"ditto.vm/internal/netd"
	"ditto.vm/internal/tap"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
)

// netdStartTimeout bounds how long the user-mode network may take to be ready.
const netdStartTimeout = 30 * time.Second

// NetError is a network that could not be opened.
type NetError struct {
	Index int // among the configured networks
	Mode  config.NetMode
	Err   error
}

// Error implements error.
func (e *NetError) Error() string { return fmt.Sprintf("net %d (%s): %v", e.Index, e.Mode, e.Err) }

// Unwrap returns the cause.
func (e *NetError) Unwrap() error { return e.Err }

// network is one opened network, before it becomes a device.
type network struct {
	backend virtionet.Backend
	name    string // for people
	mtu     int    // 0 to leave it to the guest
}

// addNets opens every network and puts it on the bus. User-mode networks are
// processes that take a while to start, so all of them start at once.
func (m *VM) addNets(ctx context.Context, opts Options) error {
	ctx, cancel := context.WithTimeout(ctx, netdStartTimeout)
	defer cancel()
	var nets []config.Net
	for _, n := range m.cfg.Nets {
		if n.Mode != config.NetNone {
			nets = append(nets, n)
		}
	}
	opened := make([]network, len(nets))
	errs := make([]error, len(nets))
	var wg sync.WaitGroup
	for i, n := range nets {
		wg.Go(func() {
			if opened[i], errs[i] = m.openNet(ctx, i, n, opts); errs[i] != nil {
				errs[i] = &NetError{Index: i, Mode: n.Mode, Err: errs[i]}
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for i, n := range nets {
		if err := m.addNet(i, n, opened[i]); err != nil {
			return err
		}
	}
	return nil
}

// addNet puts an opened network on the bus.
func (m *VM) addNet(i int, n config.Net, opened network) error {
	mac, err := n.HardwareAddr(m.cfg.Name, i)
	if err != nil {
		return fmt.Errorf("net %d: %w", i, err)
	}
	dev, err := virtionet.New(virtionet.Config{
		Backend: opened.backend,
		MAC:     virtionet.MAC(mac),
		MTU:     opened.mtu,
	})
	if err != nil {
		return fmt.Errorf("net %d: %w", i, err)
	}
	info := api.Device{Name: fmt.Sprintf("net%d", i), Backend: opened.name, MAC: mac.String()}
	return m.addVirtio(dev, info, 2, func(counters map[string]uint64) {
		c := dev.Counters()
		counters["received_frames"], counters["received_bytes"] = c.ReceivedFrames, c.ReceivedBytes
		counters["sent_frames"], counters["sent_bytes"] = c.SentFrames, c.SentBytes
		counters["received_dropped"], counters["sent_dropped"] = c.ReceiveDropped, c.SendDropped
	})
}

// openNet connects one network and registers what ends it.
func (m *VM) openNet(ctx context.Context, i int, n config.Net, opts Options) (network, error) {
	switch n.Mode {
	case config.NetUser:
		return m.startNetd(ctx, i, n, opts)
	case config.NetTap:
		return m.openTap(n)
	case config.NetSocket:
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: n.Path})
		if err != nil {
			return network{}, fmt.Errorf("connect: %w; start the peer first", err)
		}
		file, err := conn.File()
		if err = errors.Join(err, conn.Close()); err != nil {
			return network{}, err
		}
		return m.streamNet(file, n.Path, n.MTU)
	}
	return network{}, fmt.Errorf("mode %s: %w", n.Mode, unix.EINVAL)
}

// startNetd starts the user-mode network process. It ends when its socket is
// closed.
func (m *VM) startNetd(ctx context.Context, i int, n config.Net, opts Options) (network, error) {
	path, err := netd.Find()
	if err != nil {
		return network{}, err
	}
	mac, err := n.HardwareAddr(m.cfg.Name, i)
	if err != nil {
		return network{}, err
	}
	settings := netd.Config{MAC: mac, MTU: n.MTU, Subnet: netd.SubnetOf(i), NoSandbox: !bool(m.cfg.Sandbox)}
	for _, f := range n.Forwards {
		forward, err := netd.ParseForward(f.String())
		if err != nil {
			return network{}, err
		}
		settings.Forwards = append(settings.Forwards, forward)
	}
	process, socket, err := netd.Begin(path, settings, opts.NetLog)
	if err != nil {
		return network{}, err
	}
	up := m.awaitNetd(process, &NetError{Index: i, Mode: n.Mode})
	if settings.MTU == 0 {
		settings.MTU = netd.DefaultMTU
	}
	opened, err := m.streamNet(socket, "ditto-netd", settings.MTU)
	if err != nil || len(settings.Forwards) == 0 {
		return opened, err
	}
	// Someone waits to connect to the forwards: the machine is not up before
	// they are.
	select {
	case err := <-up.failed:
		return opened, err
	case <-ctx.Done():
		return opened, ctx.Err()
	}
}

// netdStart is a user-mode network that comes up.
type netdStart struct {
	failed chan error    // gets why it did not come up, or nil
	joined chan struct{} // closed behind it
}

// awaitNetd waits beside everything else until the user-mode network is up. Its
// libraries take longer to initialize than the rest of the machine, and frames
// wait in the socket meanwhile. A network that does not come up ends the
// machine, as failure says. The process ends when its socket is closed; the
// caller of awaitNetd opens the socket after it, so that it is closed before.
func (m *VM) awaitNetd(process *netd.Process, failure *NetError) *netdStart {
	start := &netdStart{failed: make(chan error, 1), joined: make(chan struct{})}
	go func() {
		defer close(start.joined)
		ctx, cancel := context.WithTimeout(context.Background(), netdStartTimeout)
		defer cancel()
		_, err := process.Ready(ctx)
		start.failed <- err
		if err != nil {
			_ = process.Kill()
			failure.Err = err
			// Closing the machine joins this goroutine, so it must not wait
			// for the machine.
			go m.fail(failure)
		}
	}()
	m.cleanup.add(func() error {
		<-start.joined
		if err := process.Wait(); err != nil {
			m.log.Warn("the user-mode network did not end well", "err", err)
		}
		return nil
	})
	return start
}

// fail ends the machine because of err, at once or as soon as it has started. It
// waits for nothing but mu: the machine may never be started.
func (m *VM) fail(err error) {
	m.mu.Lock()
	if m.endReason == nil {
		m.endReason = &Exit{Reason: ExitFailed, Err: err}
	}
	m.mu.Unlock()
	m.request(requestEnd)
}

// streamNet makes a backend of a connected stream socket, which it owns.
func (m *VM) streamNet(socket *os.File, name string, mtu int) (network, error) {
	fd, err := unix.FcntlInt(socket.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err = errors.Join(err, socket.Close()); err != nil {
		return network{}, err
	}
	m.cleanup.add(func() error { return unix.Close(fd) })
	backend, err := virtionet.NewStream(fd)
	if err != nil {
		return network{}, err
	}
	return network{backend: backend, name: name, mtu: mtu}, nil
}

// openTap opens a tap interface and joins it to its bridge.
func (m *VM) openTap(n config.Net) (network, error) {
	t, err := tap.Open(tap.Config{Name: n.Tap, Bridge: n.Bridge, MTU: n.MTU})
	if err != nil {
		return network{}, err
	}
	m.cleanup.add(func() error { return unix.Close(t.FD) })
	backend, err := virtionet.NewTap(t.FD)
	if err != nil {
		return network{}, err
	}
	return network{backend: backend, name: t.Name, mtu: t.MTU}, nil
}
