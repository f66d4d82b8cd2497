package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"

	"ditto.vm/internal/netd"
)

// asNetd makes the test binary behave as ditto-netd itself.
const asNetd = "DITTO_TEST_AS_NETD"

// withHosts names a file to be seen as /etc/hosts by that ditto-netd.
const withHosts = "DITTO_TEST_HOSTS"

func TestMain(m *testing.M) {
	if hosts := os.Getenv(withHosts); hosts != "" {
		replaceHosts(hosts)
	}
	if os.Getenv(asNetd) != "" {
		main()
	}
	os.Exit(m.Run())
}

// start runs ditto-netd as the VM process does.
func start(t *testing.T, config netd.Config) (*netd.Process, net.Conn, error) {
	t.Helper()
	t.Setenv(asNetd, "1")
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	defer cancel()
	process, socket, err := netd.Start(ctx, os.Args[0], config, t.Output())
	if err != nil {
		return nil, nil, err
	}
	conn, err := net.FileConn(socket)
	_ = socket.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(); _ = process.Wait() })
	return process, conn, nil
}

func mustStart(t *testing.T, config netd.Config) (*netd.Process, net.Conn) {
	t.Helper()
	process, conn, err := start(t, config)
	if err != nil {
		t.Fatal(err)
	}
	return process, conn
}

func parse(t *testing.T, s string) netd.Forward {
	t.Helper()
	f, err := netd.ParseForward(s)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// TestGuest is the whole way of a guest: an address by DHCP, names by DNS, a
// page from a server on the host's loopback, and a request from the host
// through a forward.
func TestGuest(t *testing.T) {
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, strings.Repeat("the host says hello\n", 10000))
	}))
	defer page.Close()

	process, conn := mustStart(t, netd.Config{MAC: guestMAC, MTU: 1400, Forwards: []netd.Forward{parse(t, "0:8080")}})
	g := newGuest(t, conn)

	t.Run("dhcp", func(t *testing.T) {
		got := fmt.Sprint(g.lease.YourIPAddr, g.lease.Router(), g.lease.DNS(), g.lease.SubnetMask())
		if want := "192.168.127.2 [192.168.127.1] [192.168.127.1] ffffff00"; got != want {
			t.Errorf("lease %s, want %s", got, want)
		}
		if mtu := g.lease.Options.Get(dhcpMTU); string(mtu) != "\x05\x78" {
			t.Errorf("MTU option %x, want 1400", mtu)
		}
	})
	t.Run("dns", func(t *testing.T) {
		for name, want := range map[string]string{
			"host.ditto.internal.":    "192.168.127.254",
			"gateway.ditto.internal.": "192.168.127.1",
		} {
			addrs, err := lookupA(t.Context(), g, name)
			if err != nil || len(addrs) == 0 || addrs[0] != want {
				t.Errorf("%s is %v, %v, want %s", name, addrs, err, want)
			}
		}
		if addrs, err := lookupA(t.Context(), g, "no-such-host.ditto.internal."); err == nil {
			t.Errorf("a name that does not exist is %v", addrs)
		}
	})
	t.Run("http to the host", func(t *testing.T) {
		client := &http.Client{Timeout: testTimeout, Transport: &http.Transport{DialContext: g.dial, DisableKeepAlives: true}}
		_, port, _ := net.SplitHostPort(page.Listener.Addr().String())
		body := get(t, client, "http://192.168.127.254:"+port)
		if want := strings.Repeat("the host says hello\n", 10000); body != want {
			t.Errorf("got %d bytes, want %d", len(body), len(want))
		}
	})
	t.Run("forward to the guest", func(t *testing.T) {
		listener, err := gonet.ListenTCP(g.stack, tcpip.FullAddress{NIC: 1, Port: 8080}, ipv4.ProtocolNumber)
		if err != nil {
			t.Fatal(err)
		}
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, "the guest says hello to "+r.URL.Path)
		})}
		go func() { _ = server.Serve(listener) }()
		defer func() { _ = server.Close() }()
		chosen := parse(t, process.Status.Forwards[0])
		client := &http.Client{Timeout: testTimeout, Transport: &http.Transport{DisableKeepAlives: true}}
		if body := get(t, client, fmt.Sprintf("http://%s/you", chosen.Host)); body != "the guest says hello to /you" {
			t.Errorf("got %q", body)
		}
	})
	t.Run("refused", func(t *testing.T) {
		// Nothing listens on port 1 of the host.
		if conn, err := g.dial(t.Context(), "tcp", "192.168.127.254:1"); err == nil {
			_ = conn.Close()
			t.Error("connected to a closed port")
		}
	})
}

// TestHostResolver: what the host's resolver knows, the guest can ask for.
func TestHostResolver(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting over /etc/hosts in a namespace takes root: run the test as root")
	}
	hosts := filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(hosts, []byte("192.0.2.77 printer.example.test\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Setenv(withHosts, hosts)
	_, conn := mustStart(t, netd.Config{})
	g := newGuest(t, conn)
	addrs, err := lookupA(t.Context(), g, "printer.example.test.")
	if err != nil || len(addrs) != 1 || addrs[0] != "192.0.2.77" {
		t.Errorf("got %v, %v", addrs, err)
	}
}

// replaceHosts runs the program again in a mount namespace that has the file
// at path as /etc/hosts.
func replaceHosts(path string) {
	runtime.LockOSThread()
	err := errors.Join(
		os.Unsetenv(withHosts),
		unix.Unshare(unix.CLONE_NEWNS),
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount(path, "/etc/hosts", "", unix.MS_BIND, ""),
		unix.Exec("/proc/self/exe", os.Args, os.Environ()),
	)
	panic(err)
}

func get(t *testing.T, client *http.Client, url string) string {
	t.Helper()
	response, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

func TestUDPForward(t *testing.T) {
	// A free port: bound, noted and given back just before.
	probe, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := probe.LocalAddr().String()
	_ = probe.Close()

	_, conn := mustStart(t, netd.Config{MAC: guestMAC, Forwards: []netd.Forward{parse(t, address+":5353/udp")}})
	g := newGuest(t, conn)
	echo, err := gonet.DialUDP(g.stack, &tcpip.FullAddress{NIC: 1, Port: 5353}, nil, ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = echo.Close() }()
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := echo.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = echo.WriteTo(append([]byte("echo "), buf[:n]...), from)
		}
	}()
	client, err := net.Dial("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	if _, err := client.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	_ = client.SetReadDeadline(deadline())
	buf := make([]byte, 64)
	n, err := client.Read(buf)
	if err != nil || string(buf[:n]) != "echo hello" {
		t.Errorf("got %q, %v", buf[:n], err)
	}
}

// TestPortBusy: a port that is taken is one line and an exit code of its own,
// before the VM starts.
func TestPortBusy(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tcp.Close() }()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = udp.Close() }()
	for _, test := range []struct {
		forward string
		code    int
		text    string
	}{
		{tcp.Addr().String() + ":80", netd.ExitPortBusy, "tcp port " + port(tcp.Addr()) + " of 127.0.0.1 is already in use"},
		{udp.LocalAddr().String() + ":80/udp", netd.ExitPortBusy, "udp port " + port(udp.LocalAddr()) + " of 127.0.0.1 is already in use"},
		{"192.0.2.1:0:80", netd.ExitPortDeny, "this host has no address 192.0.2.1"},
	} {
		check := func(who string, err error) {
			t.Helper()
			var failed *netd.StartError
			if !errors.As(err, &failed) || failed.Code != test.code || !strings.Contains(failed.Text, test.text) || strings.Contains(failed.Text, "\n") {
				t.Errorf("%s: %s says %#v, want code %d and one line with %q", test.forward, who, err, test.code, test.text)
			}
		}
		// The VM's side finds it before it starts the process.
		_, _, err := start(t, netd.Config{Forwards: []netd.Forward{parse(t, test.forward)}})
		check("the parent", err)
		// And so does the process, in case it is taken in between.
		status, statusPeer := io.Pipe()
		done := make(chan int, 1)
		go func() {
			done <- run([]string{"--listen", filepath.Join(t.TempDir(), "s"), "--sandbox=off", "--forward", test.forward}, statusPeer, t.Output())
		}()
		_, err = netd.ReadStatus(status)
		check("the process", err)
		if code := <-done; code != test.code {
			t.Errorf("%s: exit code %d, want %d", test.forward, code, test.code)
		}
	}
}

// TestListen serves a peer that connects to a path, and removes it.
func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "net.sock")
	status, statusPeer := io.Pipe()
	done := make(chan int, 1)
	go func() {
		done <- run([]string{"--listen", path, "--mac", guestMAC.String(), "--sandbox=off"}, statusPeer, t.Output())
	}()
	if _, err := netd.ReadStatus(status); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	newGuest(t, conn)
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the path is still there: %v", err)
	}
	_ = conn.Close()
	if code := <-done; code != netd.ExitOK {
		t.Errorf("exit code %d", code)
	}
}

// TestEndsWithTheSocket: no process stays behind when the VM is gone.
func TestEndsWithTheSocket(t *testing.T) {
	process, conn := mustStart(t, netd.Config{})
	_ = conn.Close()
	if err := process.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
}

// TestSandbox: the process can gain no privileges.
func TestSandbox(t *testing.T) {
	process, _ := mustStart(t, netd.Config{})
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", process.PID()))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(status), "NoNewPrivs:\t1\n") {
		t.Errorf("it may still gain privileges:\n%s", status)
	}
}

// TestHostileFrames: a length that no frame has ends the process; it does not
// allocate it.
func TestHostileFrames(t *testing.T) {
	process, conn := mustStart(t, netd.Config{})
	if _, err := conn.Write([]byte{0xff, 0xff, 0xff, 0xff}); err != nil {
		t.Fatal(err)
	}
	if err := process.Wait(); err == nil {
		t.Error("it went on")
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{{}, {"--fd", "3", "--listen", "x"}, {"--nonsense"}, {"--listen", "x", "--mtu", "1"}, {"--listen", "x", "--forward", "1"}} {
		status, statusPeer := io.Pipe()
		done := make(chan int, 1)
		go func() { done <- run(args, statusPeer, t.Output()) }()
		_, err := netd.ReadStatus(status)
		var failed *netd.StartError
		if !errors.As(err, &failed) || failed.Code != netd.ExitUsage {
			t.Errorf("%q: %v", args, err)
		}
		if code := <-done; code != netd.ExitUsage {
			t.Errorf("%q: exit code %d", args, code)
		}
	}
}

func port(a net.Addr) string { return fmt.Sprint(netip.MustParseAddrPort(a.String()).Port()) }

const dhcpMTU = dhcpv4.GenericOptionCode(26)

func deadline() time.Time { return time.Now().Add(testTimeout) }

// lookupA asks the guest's DNS server for the IPv4 addresses of name.
func lookupA(ctx context.Context, g *guest, name string) ([]string, error) {
	conn, err := g.dial(ctx, "udp", netip.AddrPortFrom(netip.AddrFrom4([4]byte(g.lease.DNS()[0].To4())), 53).String())
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(deadline())
	question := new(dns.Msg).SetQuestion(name, dns.TypeA)
	c := &dns.Conn{Conn: packetConn{conn}}
	if err := c.WriteMsg(question); err != nil {
		return nil, err
	}
	answer, err := c.ReadMsg()
	if err != nil {
		return nil, err
	}
	if answer.Rcode != dns.RcodeSuccess {
		return nil, errors.New(dns.RcodeToString[answer.Rcode])
	}
	var addrs []string
	for _, record := range answer.Answer {
		if a, ok := record.(*dns.A); ok {
			addrs = append(addrs, a.A.String())
		}
	}
	return addrs, nil
}

// packetConn tells the DNS library that the stack's connection is UDP.
type packetConn struct{ net.Conn }

func (packetConn) ReadFrom([]byte) (int, net.Addr, error) { return 0, nil, errors.ErrUnsupported }
func (packetConn) WriteTo([]byte, net.Addr) (int, error)  { return 0, errors.ErrUnsupported }
