package netd

import (
	"errors"
	"flag"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseForward(t *testing.T) {
	for _, test := range []struct{ in, want string }{
		{"8080:80", "127.0.0.1:8080:80/tcp"},
		{"8080:80/udp", "127.0.0.1:8080:80/udp"},
		{"0.0.0.0:8080:80", "0.0.0.0:8080:80/tcp"},
		{"[::1]:22:22/tcp", "[::1]:22:22/tcp"},
		{"0:80", "127.0.0.1:0:80/tcp"},
	} {
		f, err := ParseForward(test.in)
		if err != nil || f.String() != test.want {
			t.Errorf("%q is %s, %v, want %s", test.in, f, err, test.want)
		}
	}
	for _, in := range []string{
		"", "80", ":80", "80:", "80:0", "0:80/udp", "65536:80", "80:65536", "-1:80", "+1:80", "080:80", "80:80/sctp", "80:80/",
		"host:80:80", "::1:80:80", "[::1:80:80", "[127.0.0.1]:80:80", "1.2.3.4:5:6:7", "80:80\n",
	} {
		if f, err := ParseForward(in); err == nil {
			t.Errorf("%q is %s", in, f)
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: more than one line: %v", in, err)
		}
	}
}

func FuzzParseForward(f *testing.F) {
	for _, s := range []string{"8080:80", "[::1]:22:22/udp", "0.0.0.0:0:1/tcp", "[fe80::1%eth0]:1:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		first, err := ParseForward(s)
		if err != nil {
			return
		}
		if again, err := ParseForward(first.String()); err != nil || again != first {
			t.Fatalf("%q is %s, which is %s, %v", s, first, again, err)
		}
	})
}

func TestAddressesOf(t *testing.T) {
	for _, test := range []struct{ in, gateway, guest, host string }{
		{"192.168.127.0/24", "192.168.127.1", "192.168.127.2", "192.168.127.254"},
		{"10.0.0.0/8", "10.0.0.1", "10.0.0.2", "10.255.255.254"},
		{"10.1.2.8/29", "10.1.2.9", "10.1.2.10", "10.1.2.14"},
		{"172.16.16.0/20", "172.16.16.1", "172.16.16.2", "172.16.31.254"},
	} {
		a, err := AddressesOf(netip.MustParsePrefix(test.in))
		if err != nil || a.Gateway.String() != test.gateway || a.Guest.String() != test.guest || a.Host.String() != test.host {
			t.Errorf("%s: %+v, %v", test.in, a, err)
		}
	}
	for _, in := range []string{"10.0.0.1/24", "10.0.0.0/30", "0.0.0.0/0", "fd00::/64"} {
		if a, err := AddressesOf(netip.MustParsePrefix(in)); err == nil {
			t.Errorf("%s: %+v", in, a)
		}
	}
	if a, b := SubnetOf(0).String(), SubnetOf(3).String(); a != DefaultSubnet || b != "192.168.130.0/24" {
		t.Errorf("subnets %s and %s", a, b)
	}
	if a, err := AddressesOf(netip.Prefix{}); err == nil {
		t.Errorf("no subnet: %+v", a)
	}
}

func TestArgs(t *testing.T) {
	mac, _ := net.ParseMAC("52:54:00:12:34:56")
	udp, _ := ParseForward("5353:53/udp")
	tcp, _ := ParseForward("[::1]:0:22")
	for _, want := range []Config{
		{FD: 3, StatusFD: 4, MTU: DefaultMTU, Subnet: netip.MustParsePrefix(DefaultSubnet)},
		{FD: 3, StatusFD: 4, MTU: 9000, Subnet: netip.MustParsePrefix("10.0.2.0/24"), MAC: mac, Forwards: []Forward{udp, tcp, tcp}, NoSandbox: true, Verbose: true},
		{FD: -1, Listen: "/tmp/a socket", StatusFD: 1, MTU: MinMTU, Subnet: netip.MustParsePrefix(DefaultSubnet)},
	} {
		got, err := ParseArgs(want.Args(), io.Discard)
		if err != nil {
			t.Errorf("%q: %v", want.Args(), err)
		} else if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
			t.Errorf("%q: (-want +got)\n%s", want.Args(), diff)
		}
	}
	for _, args := range []string{
		"--fd 3 --mac 01:00:00:00:00:00", "--fd 3 --mac 1", "--fd 3 --subnet 10.0.0.0/31", "--fd 3 --mtu 65521", "--fd 3 rest",
		"--fd 3 --forward 80:80 --forward 80:81", "--fd 3 --sandbox=maybe",
	} {
		if c, err := ParseArgs(strings.Fields(args), io.Discard); err == nil {
			t.Errorf("%q is %+v", args, c)
		}
	}
	var help strings.Builder
	if _, err := ParseArgs([]string{"--help"}, &help); !errors.Is(err, flag.ErrHelp) || !strings.Contains(help.String(), "--listen") {
		t.Errorf("help: %v\n%s", err, help.String())
	}
}

func TestReadStatus(t *testing.T) {
	for _, test := range []struct {
		in   string
		code int
	}{
		{"", ExitFailure}, {"{", ExitFailure}, {"[]", ExitFailure}, {`{"ready":false,"error":"x","code":3}`, ExitPortBusy},
	} {
		_, err := ReadStatus(strings.NewReader(test.in))
		var failed *StartError
		if !errors.As(err, &failed) || failed.Code != test.code {
			t.Errorf("%q: %v", test.in, err)
		}
	}
}

// TestStartFails: a program that is not ditto-netd is an error, not a hang.
func TestStartFails(t *testing.T) {
	for _, path := range []string{"/nonexistent", "/bin/true", "/bin/cat"} {
		if _, conn, err := Start(t.Context(), path, Config{}, io.Discard); err == nil {
			_ = conn.Close()
			t.Errorf("%s started", path)
		}
	}
}
