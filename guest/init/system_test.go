package main

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestReaper starts programs and orphans; each waiter gets its own status.
func TestReaper(t *testing.T) {
	r := newReaper()
	done, stopped := make(chan struct{}), make(chan struct{})
	go func() { defer close(stopped); r.run(done) }()
	defer func() { close(done); <-stopped }()

	var waits []<-chan syscall.WaitStatus
	for _, script := range []string{"exit 0", "exit 3", "kill -9 $$", "(true &) ; exit 7"} {
		_, w, err := r.start("/bin/sh", []string{"sh", "-c", script}, &syscall.ProcAttr{Files: []uintptr{0, 1, 2}})
		if err != nil {
			t.Fatal(err)
		}
		waits = append(waits, w)
	}
	var got []int
	for _, w := range waits {
		got = append(got, exitCode(<-w))
	}
	if want := []int{0, 3, 137, 7}; !slices.Equal(got, want) {
		t.Errorf("exit codes %v, want %v", got, want)
	}
	if _, _, err := r.start("/nonexistent", []string{"x"}, &syscall.ProcAttr{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("err %v, want ErrNotExist", err)
	}
}

func TestNetlinkRequests(t *testing.T) {
	for _, tc := range []struct {
		name string
		msg  []byte
		want string // as iproute2 sends it, little endian, sequence 1
	}{
		{"addr", addrRequest(2, netip.MustParsePrefix("10.0.2.15/24")),
			"28000000" + "1400" + "0505" + "01000000" + "00000000" + "02180000" + "02000000" + "08000200" + "0a00020f" + "08000100" + "0a00020f"},
		{"route", defaultRouteRequest(2, netip.MustParseAddr("10.0.2.2")),
			"2c000000" + "1800" + "0505" + "01000000" + "00000000" + "02000000" + "fe030001" + "00000000" + "08000500" + "0a000202" + "08000400" + "02000000"},
		{"link", linkUpRequest(1),
			"20000000" + "1000" + "0500" + "01000000" + "00000000" + "00000000" + "01000000" + "01000000" + "01000000"},
	} {
		if got := hex.EncodeToString(tc.msg); got != tc.want {
			t.Errorf("%s:\n got %s\nwant %s", tc.name, got, tc.want)
		}
	}
}

func TestParseAck(t *testing.T) {
	ack := func(code int32) []byte {
		b := make([]byte, 36)
		binary.NativeEndian.PutUint16(b[4:], unix.NLMSG_ERROR)
		binary.NativeEndian.PutUint32(b[16:], uint32(code))
		return b
	}
	if err := parseAck(ack(0)); err != nil {
		t.Error(err)
	}
	if err := parseAck(ack(-int32(unix.EEXIST))); !errors.Is(err, unix.EEXIST) {
		t.Errorf("got %v, want EEXIST", err)
	}
	if parseAck(nil) == nil || parseAck(make([]byte, 20)) == nil {
		t.Error("a short or foreign answer passed for success")
	}
}

func TestPlanNetwork(t *testing.T) {
	static := netSpec{mode: netStatic, addr: netip.MustParsePrefix("10.0.0.2/24")}
	for _, tc := range []struct {
		specs []netSpec
		want  map[string]netMode
	}{
		{nil, map[string]netMode{"eth0": netDHCP, "eth1": netDHCP}},
		{[]netSpec{{mode: netOff}}, map[string]netMode{"eth0": netOff, "eth1": netOff}},
		{[]netSpec{static}, map[string]netMode{"eth0": netStatic, "eth1": netDHCP}},
		{[]netSpec{{mode: netOff}, {iface: "eth1", mode: netDHCP}}, map[string]netMode{"eth0": netOff, "eth1": netDHCP}},
		{[]netSpec{{iface: "eth9", mode: netDHCP}}, map[string]netMode{"eth0": netDHCP, "eth1": netDHCP, "eth9": netDHCP}},
	} {
		got := map[string]netMode{}
		for name, s := range planNetwork([]string{"eth0", "eth1"}, tc.specs) {
			got[name] = s.mode
		}
		if diff := cmp.Diff(tc.want, got); diff != "" {
			t.Errorf("%+v (-want +got):\n%s", tc.specs, diff)
		}
	}
}

func TestPowerButtons(t *testing.T) {
	sysfs := t.TempDir()
	for name, keys := range map[string]string{
		"event0": "10000000000000 0",            // bit 116
		"event1": "402000000 3803078f800d001 0", // a keyboard
		"event2": "0",
	} {
		dir := filepath.Join(sysfs, "class/input", name, "device/capabilities")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "key"), []byte(keys+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got := powerButtons(sysfs); !slices.Equal(got, []string{"event0"}) {
		t.Errorf("got %v, want event0", got)
	}
}

func TestIsPowerPress(t *testing.T) {
	ev := func(kind, code uint16, value uint32) []byte {
		b := make([]byte, inputEventLen)
		binary.NativeEndian.PutUint16(b[16:], kind)
		binary.NativeEndian.PutUint16(b[18:], code)
		binary.NativeEndian.PutUint32(b[20:], value)
		return b
	}
	if !isPowerPress(ev(evKey, keyPower, 1)) {
		t.Error("a press was missed")
	}
	for _, b := range [][]byte{nil, ev(evKey, keyPower, 0), ev(evKey, 30, 1), ev(0, keyPower, 1)} {
		if isPowerPress(b) {
			t.Errorf("%v is not a press", b)
		}
	}
}

func TestDiskMounts(t *testing.T) {
	const mounts = "rootfs / rootfs rw 0 0\nproc /proc proc rw 0 0\n/dev/vda /mnt/vda ext4 rw 0 0\n" +
		"/dev/vdb /mnt/vda/with\\040blank vfat rw 0 0\n/dev/vdc / ext4 rw 0 0\nshort\n"
	want := []string{"/mnt/vda/with blank", "/mnt/vda"}
	if got := diskMounts(mounts); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func FuzzDiskMounts(f *testing.F) {
	f.Add("/dev/vda /mnt/a\\040b ext4 rw 0 0\n")
	f.Add("/dev/x /\\999\\1 y")
	f.Fuzz(func(t *testing.T, s string) {
		for _, d := range diskMounts(s) {
			if d == "/" {
				t.Error("the root itself is not for us to unmount")
			}
		}
	})
}

func TestParseControl(t *testing.T) {
	for _, tc := range []struct {
		cmd   string
		act   action
		force bool
		ok    bool
	}{
		{"poweroff", actPowerOff, false, true}, {"/sbin/reboot", actReboot, false, true}, {"halt -f", actHalt, true, true},
		{"shutdown -r now", actReboot, false, true}, {"shutdown -h now", actPowerOff, false, true}, {"reboot -x", 0, false, false},
	} {
		f := strings.Fields(tc.cmd)
		act, force, err := parseControl(f[0], f[1:])
		if act != tc.act || force != tc.force || (err == nil) != tc.ok {
			t.Errorf("%s: got %v %v %v", tc.cmd, act, force, err)
		}
	}
	seen := map[action]bool{}
	for _, a := range controlSignals() {
		seen[a] = true
	}
	if !seen[actPowerOff] || !seen[actReboot] || !seen[actHalt] {
		t.Error("an action has no signal")
	}
}

func TestActiveConsole(t *testing.T) {
	sysfs := t.TempDir()
	if got := activeConsole(sysfs); got != "" {
		t.Errorf("got %q from nothing", got)
	}
	dir := filepath.Join(sysfs, "class/tty/console")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "active"), []byte("tty0 ttyS0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := activeConsole(sysfs); got != "ttyS0" {
		t.Errorf("got %q, want the last one", got)
	}
}

func TestUserProcesses(t *testing.T) {
	proc := t.TempDir()
	for pid, cmdline := range map[string]string{"1": "/init", "2": "", "30": "/bin/sh", "31": "sleep", "self": "x"} {
		if err := os.Mkdir(filepath.Join(proc, pid), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(proc, pid, "cmdline"), []byte(cmdline), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got := userProcesses(proc); got != 2 {
		t.Errorf("got %d, want 2", got)
	}
}
