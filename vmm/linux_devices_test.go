package vmm

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ditto.vm/images/disk"
	"ditto.vm/internal/labtest"
	"ditto.vm/vmm/config"
)

// virtioModules are the drivers that Debian's generic kernels have as modules.
var virtioModules = []string{"virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "virtio_balloon", "virtio_console"}

// testDisk makes a raw disk of size bytes whose first bytes are its own name.
func testDisk(t testing.TB, name string, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(name); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return path
}

// deafPeer listens on a unix socket and swallows what a network sends.
func deafPeer(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "net.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.Copy(io.Discard, c)
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return path
}

// TestLinuxManyDevices: eight disks and four networks at once, in order, each
// usable, with rng, balloon and a virtio console beside them.
func TestLinuxManyDevices(t *testing.T) {
	requireLinux(t)
	c := linuxConfig(t, "6.12", `
for d in a b c d e f g h; do
	echo "disk vd$d $(head -c 6 /dev/vd$d) serial $(cat /sys/block/vd$d/serial) size $(cat /sys/block/vd$d/size)"
	[ $d = h ] || { echo "back$d" | dd of=/dev/vd$d bs=512 seek=8 conv=sync,fsync 2>/dev/null && echo "wrote vd$d"; }
done
dd if=/dev/zero of=/dev/vdh bs=512 count=1 2>/dev/null && echo "wrote the read-only disk"
echo "vdh readonly $(blockdev --getro /dev/vdh)"
for i in 0 1 2 3; do ip link set eth$i up; echo "net eth$i $(cat /sys/class/net/eth$i/address) mtu $(cat /sys/class/net/eth$i/mtu) carrier $(cat /sys/class/net/eth$i/carrier)"; done
echo "rng $(cat /sys/class/misc/hw_random/rng_available)"
head -c 64 /dev/hwrng | wc -c | sed 's/^/random /'
echo "pci $(ls /sys/bus/pci/devices | wc -l)"
grep -c virtio /proc/interrupts | sed 's/^/interrupts /'
`, virtioModules...)
	for i := range 8 {
		d := config.Disk{Path: testDisk(t, fmt.Sprintf("disk-%d", i), 1<<20), Serial: fmt.Sprintf("S%d", i), ReadOnly: i == 7}
		if i%2 == 1 {
			d.Cache = disk.CacheNone
		}
		c.Disks = append(c.Disks, d)
	}
	for i := range 4 {
		c.Nets = append(c.Nets, config.Net{Mode: config.NetSocket, Path: deafPeer(t), MAC: fmt.Sprintf("52:54:00:00:00:%02x", i), MTU: 1400 + i})
	}
	c.RNG, c.Balloon.Enabled = true, true
	out, exit := runLinux(t, c)
	if exit.Reason != ExitPowerOff {
		t.Errorf("exit %+v", exit)
	}
	want := []string{"rng virtio_rng.0", "random 64", "pci 15", "vdh readonly 1"}
	for i := range 8 {
		want = append(want, fmt.Sprintf("disk vd%c disk-%d serial S%d size 2048", 'a'+i, i, i))
		if i < 7 {
			want = append(want, fmt.Sprintf("wrote vd%c", 'a'+i))
		}
	}
	for i := range 4 {
		want = append(want, fmt.Sprintf("net eth%d 52:54:00:00:00:%02x mtu %d carrier 1", i, i, 1400+i))
	}
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Errorf("no %q on the console", w)
		}
	}
	if strings.Contains(out, "wrote the read-only disk") {
		t.Error("a read-only disk was written")
	}
	for i, d := range c.Disks[:7] {
		b, err := os.ReadFile(d.Path)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(b[4096:4101]); got != fmt.Sprintf("back%c", 'a'+i) {
			t.Errorf("disk %d holds %q at 4096", i, got)
		}
	}
	if t.Failed() {
		t.Log(out)
	}
}

// TestLinuxVirtioConsole: the console on virtio, in and out.
func TestLinuxVirtioConsole(t *testing.T) {
	requireLinux(t)
	c := linuxConfig(t, "6.12", `
exec < /dev/hvc0 > /dev/hvc0 2>&1
echo READY
read line
echo "heard $line"
`, virtioModules...)
	c.Console = config.ConsoleVirtio
	out := newConsole()
	m := newVM(t, c, out)
	ctx, cancel := context.WithTimeout(t.Context(), linuxTimeout)
	defer cancel()
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := out.waitFor(ctx, "READY"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if _, err := m.ConsoleInput(ctx, []byte("good morning\r")); err != nil {
		t.Fatal(err)
	}
	exit, err := m.Wait(ctx)
	if err != nil || exit.Reason != ExitPowerOff || !strings.Contains(out.String(), "heard good morning") {
		t.Errorf("exit %+v, %v:\n%s", exit, err, out)
	}
}

// TestLinuxSerialInput: a line typed on the serial console reaches a program.
func TestLinuxSerialInput(t *testing.T) {
	requireLinux(t)
	c := linuxConfig(t, "6.12-cloud", `
exec < /dev/ttyS0 > /dev/ttyS0 2>&1
echo READY
read line
echo "heard $line"
`)
	out := newConsole()
	m := newVM(t, c, out)
	ctx, cancel := context.WithTimeout(t.Context(), linuxTimeout)
	defer cancel()
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := out.waitFor(ctx, "READY"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if _, err := m.ConsoleInput(ctx, []byte("good morning\r")); err != nil {
		t.Fatal(err)
	}
	exit, err := m.Wait(ctx)
	if err != nil || exit.Reason != ExitPowerOff || !strings.Contains(out.String(), "heard good morning") {
		t.Errorf("exit %+v, %v:\n%s", exit, err, out)
	}
}

// TestLinuxDiskContent: what the guest writes through a file system is what the
// host reads from the image.
func TestLinuxDiskContent(t *testing.T) {
	requireLinux(t)
	mib := labtest.Count(32, 256)
	c := linuxConfig(t, "6.12", fmt.Sprintf(`
dd if=/dev/urandom of=/tmp/seed bs=1M count=8 2>/dev/null
i=0; while [ $i -lt %d ]; do cat /tmp/seed; i=$((i+8)); done | dd of=/dev/vda bs=1M conv=fsync 2>/dev/null
echo "sum $(dd if=/dev/vda bs=1M count=%d iflag=direct 2>/dev/null | sha256sum | cut -c1-64)"
`, mib, mib), virtioModules...)
	c.Memory.Size = 512 << 20
	path := testDisk(t, "disk", int64(mib)<<20)
	c.Disks = []config.Disk{{Path: path}}
	out, exit := runLinux(t, c)
	if exit.Reason != ExitPowerOff {
		t.Errorf("exit %+v:\n%s", exit, out)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if n, err := io.Copy(h, f); err != nil || n != int64(mib)<<20 {
		t.Fatalf("read %d bytes, %v", n, err)
	}
	if want := fmt.Sprintf("sum %x", h.Sum(nil)); !strings.Contains(out, want) {
		t.Errorf("host has %s, guest says:\n%s", want, out)
	}
	labtest.Proof(t, "disk-raw", "SHA-256 of %d MiB: equal in the guest and on the host", mib)
}
