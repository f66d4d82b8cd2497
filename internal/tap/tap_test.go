package tap

import (
	"errors"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNamespace puts the test into a network namespace of its own. The thread is
// not unlocked, so it ends with the test and the namespace with it.
func inNamespace(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("making network namespaces takes root: run the test as root")
	}
	if _, err := os.Stat(device); err != nil {
		t.Skipf("no %s: try modprobe tun", device)
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("unshare: %v", err)
	}
}

func mustOpen(t *testing.T, config Config) *Tap {
	t.Helper()
	tap, err := Open(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(tap.FD) })
	return tap
}

func TestOpenCreates(t *testing.T) {
	inNamespace(t)
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
	if err := netlink.LinkAdd(bridge); err != nil {
		t.Fatal(err)
	}
	tap := mustOpen(t, Config{Bridge: "br0", MTU: 9000})
	if tap.Name != "ditto0" || tap.MTU != 9000 {
		t.Errorf("opened %+v", tap)
	}
	link, err := netlink.LinkByName(tap.Name)
	if err != nil {
		t.Fatal(err)
	}
	if a := link.Attrs(); a.MTU != 9000 || a.Flags&net.FlagUp == 0 || a.MasterIndex != bridge.Index {
		t.Errorf("the interface is %+v", a)
	}
	if second := mustOpen(t, Config{}); second.Name != "ditto1" || second.MTU != 1500 {
		t.Errorf("the second is %+v", second)
	}
	if _, err := Open(Config{Name: "ditto0"}); !errors.Is(err, unix.EBUSY) {
		t.Errorf("a tap in use: %v", err)
	}
	// What Open made goes with its descriptor.
	fd, err := Open(Config{Name: "gone0"})
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Close(fd.FD)
	if _, err := netlink.LinkByName("gone0"); !errors.As(err, new(netlink.LinkNotFoundError)) {
		t.Errorf("the closed tap: %v", err)
	}
}

func TestOpenErrors(t *testing.T) {
	inNamespace(t)
	if err := netlink.LinkAdd(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "dummy0"}}); err != nil {
		// Kernels without the dummy driver have bridges.
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "dummy0"}}); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		config Config
		text   string
	}{
		{Config{Name: "sixteencharacter"}, "longer than"},
		{Config{Name: "dummy0"}, "not a plain tap"},
		{Config{Bridge: "br9"}, "ip link add br9 type bridge"},
		{Config{Bridge: "lo"}, "not a bridge"},
		{Config{MTU: 1 << 30}, "mtu"},
	} {
		tap, err := Open(test.config)
		if err == nil {
			t.Errorf("%+v opened %+v", test.config, tap)
		} else if !strings.Contains(err.Error(), test.text) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%+v: %v, want one line with %q", test.config, err, test.text)
		}
	}
	links, err := netlink.LinkList()
	if err != nil || len(links) != 2 { // lo and dummy0
		t.Errorf("left behind: %v, %v", links, err)
	}
}

func TestErrorTexts(t *testing.T) {
	for _, test := range []struct {
		err  error
		cure string
	}{
		{deviceError(unix.ENOENT), "modprobe tun"},
		{deviceError(unix.EACCES), "--net user"},
		{attachError("t0", unix.EPERM), "ip tuntap add"},
		{attachError("t0", unix.EBUSY), "choose another name"},
		{configureError(unix.EPERM, "t0", "up"), "'ip link set t0 up'"},
	} {
		if !strings.Contains(test.err.Error(), test.cure) {
			t.Errorf("%v does not say %q", test.err, test.cure)
		}
	}
}
