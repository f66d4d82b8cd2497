package vmm

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ditto.vm/images/kernel"
	"ditto.vm/internal/labtest"
	"ditto.vm/internal/material"
	"ditto.vm/migration/state"
	"ditto.vm/vmm/config"
)

// Addresses of the guest and of the peer that it asks for.
const (
	guestAddress = "10.9.8.7"
	peerAddress  = "10.9.8.1"
)

// arpPeer listens on a unix socket for a network, and answers whoever asks for
// peerAddress. announced is closed when the guest's address was announced, to
// switches by RARP and to hosts by ARP.
func arpPeer(t testing.TB) (path string, announced <-chan struct{}) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "net.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	both, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		serveARP(c, sync.OnceFunc(func() { close(both) }))
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return path, both
}

// serveARP reads frames until the network ends.
func serveARP(c io.ReadWriter, announced func()) {
	guest, peer := netip.MustParseAddr(guestAddress).AsSlice(), netip.MustParseAddr(peerAddress).AsSlice()
	var byRARP, byARP bool
	for {
		var size [4]byte
		if _, err := io.ReadFull(c, size[:]); err != nil {
			return
		}
		frame := make([]byte, binary.BigEndian.Uint32(size[:])%(1<<17))
		if _, err := io.ReadFull(c, frame); err != nil {
			return
		}
		if len(frame) < 42 {
			continue
		}
		sender, from, to := frame[22:28], frame[28:32], frame[38:42]
		switch binary.BigEndian.Uint16(frame[12:]) {
		case 0x8035:
			byRARP = true
		case 0x0806:
			byARP = byARP || bytes.Equal(from, guest) && bytes.Equal(to, guest)
			if !bytes.Equal(to, peer) {
				break
			}
			mac := []byte{2, 0, 0, 9, 8, 1}
			answer := slices.Concat(sender, mac, frame[12:20], []byte{0, 2}, mac, peer, sender, from, make([]byte, 18))
			if _, err := c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(answer))), answer...)); err != nil {
				return
			}
		}
		if byRARP && byARP {
			announced()
		}
	}
}

// countScript counts on the console and on the disk until it knows of enough
// forks, and says at the end what became of everything.
const countScript = `
irqs() { grep 'virtio' /proc/interrupts | grep "$1" | awk '{ n += $2 + $3 } END { print n }'; }
forks() { dmesg | grep -c 'virtual machine fork'; }
identity() { cat /proc/sys/kernel/random/boot_id /tmp/nonce; }
ip addr add ` + guestAddress + `/24 dev eth0; ip link set eth0 up
mount -t tmpfs nonce /tmp
head -c 32 /dev/urandom | md5sum > /tmp/nonce
identity=$(identity)
until dmesg | grep -q 'crng init done'; do usleep 100000; done
i=0 f=0 booted=$(dmesg | wc -l)
while [ $f -lt %d ] && [ $i -lt 5000 ]; do
	i=$((i+1)) f=$(forks)
	echo "block $i" | dd of=/dev/vda bs=512 seek=$i conv=sync,fsync 2>/dev/null || echo "WRITE FAILED"
	echo "count $i up $(cut -d' ' -f1 /proc/uptime) forks $f"
	usleep 20000
done
echo 3 > /proc/sys/vm/drop_caches
n=0; wrong=0
while [ $n -lt $i ]; do
	n=$((n+1))
	[ "$(dd if=/dev/vda bs=512 skip=$n count=1 2>/dev/null | head -n 1)" = "block $n" ] || wrong=$((wrong+1))
done
echo "blocks $n wrong $wrong"
before=$(irqs req); dd if=/dev/vda of=/dev/null bs=512 count=1 iflag=direct 2>/dev/null; dd if=/dev/vda of=/dev/null bs=4096 count=8 iflag=direct 2>/dev/null
[ "$(irqs req)" -gt "$before" ] && echo "disk interrupts arrive"
echo "random $(head -c 64 /dev/hwrng | wc -c)"
echo "address $(cat /sys/class/net/eth0/address) carrier $(cat /sys/class/net/eth0/carrier)"
ping -c 1 -W 20 ` + peerAddress + ` >/dev/null &
n=0; until grep -q '^` + peerAddress + ` .* 0x2 ' /proc/net/arp || [ $n -ge 200 ]; do n=$((n+1)); usleep 100000; done
[ $n -lt 200 ] && echo "the network answers"
[ "$(identity)" = "$identity" ] && echo "the same guest"
echo "forks told $(forks)"
echo "cpus $(grep -c ^processor /proc/cpuinfo) clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
for c in 1 2; do taskset $c sh -c 'a=0; while [ $a -lt 2000 ]; do a=$((a+1)); done' && echo "CPU mask $c works"; done
dmesg | grep -iE 'crng|clocksource'
dmesg | tail -n +$((booted+1)) | grep -iE 'bug:|soft lockup|rcu.*stall|unstable|skew|needs_reset|blocked for more|I/O error' | sed 's/^/complaint: /'
`

// TestLinuxRestore: a guest with every device is saved and restored while it
// counts, and goes on: no time has passed for it, its disk, its network, its
// balloon and its timers work, what it had in memory is there, and it knows after
// each restore that it is another. It complains of nothing.
func TestLinuxRestore(t *testing.T) {
	requireLinux(t)
	kernels := []string{"6.12", "6.1"}[:labtest.Count(1, 2)]
	restores := labtest.Count(3, 10)
	counted := 0
	for _, spec := range kernels {
		t.Run(spec, func(t *testing.T) { counted += linuxRestore(t, spec, restores) })
	}
	if !t.Failed() {
		labtest.Proof(t, "restore-linux", "%d kernels with disk, network, rng, balloon and console, each saved and restored %d times: they count to %d, every count and block there, uptime without a step, each restore noticed, no complaint", len(kernels), restores, counted)
	}
}

// linuxRestore restores a guest of one kernel again and again, and returns how far
// it counted.
func linuxRestore(t *testing.T, spec string, restores int) (counted int) {
	c := linuxConfig(t, spec, fmt.Sprintf(countScript, restores), virtioModules...)
	c.Disks = []config.Disk{{Path: testDisk(t, "disk", 4<<20)}}
	peer, _ := arpPeer(t)
	c.Nets = []config.Net{{Mode: config.NetSocket, Path: peer}}
	c.RNG, c.Balloon.Enabled = true, true
	ctx, cancel := context.WithTimeout(t.Context(), linuxTimeout+time.Duration(restores)*time.Minute)
	defer cancel()
	out := newConsole()
	m := newVM(t, c, out)
	fatal := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%v; console:\n%s\n%s", err, out, m.whereAbouts(t))
		}
	}
	fatal(m.Start(ctx))
	fatal(out.waitFor(ctx, "count 1 "))
	const balloon = 32 << 20
	fatal(m.SetBalloon(balloon))
	mac := m.Info().Devices[1].MAC
	for i := range restores {
		fatal(waitBalloon(ctx, m, balloon))
		// Until it has been told of the last restore: two changes before a
		// guest looks are one to it.
		fatal(out.waitFor(ctx, fmt.Sprintf(" forks %d\r", i)))
		fatal(m.Pause(ctx))
		fatal(m.platform.drain())
		held := heldPages(m)
		var sent <-chan struct{}
		next := c
		next.Name = fmt.Sprintf("restored-%d", i) // and yet the saved address
		peer, sent = arpPeer(t)
		next.Nets = []config.Net{{Mode: config.NetSocket, Path: peer}}
		m = restoreOf(t, m, next, RestoreOptions{Options: Options{Console: out}, NewGenerationID: true})
		if b, err := m.Balloon(); err != nil || b.ActualBytes != balloon {
			t.Errorf("balloon %+v after the restore, %v", b, err)
		}
		if got := heldPages(m); !slices.Equal(got, held) || len(got) == 0 {
			t.Errorf("the balloon holds other pages after the restore: %v, before %v", got, held)
		}
		fatal(m.Resume(ctx))
		select {
		case <-sent:
		case <-ctx.Done():
			fatal(fmt.Errorf("the guest was not announced to the network: %w", ctx.Err()))
		}
	}
	fatal(m.SetBalloon(0))
	fatal(waitBalloon(ctx, m, 0))
	exit, err := m.Wait(ctx)
	fatal(err)
	text := out.String()
	if exit.Reason != ExitPowerOff {
		t.Errorf("exit %+v", exit)
	}
	counted = checkCounts(t, text)
	for _, want := range []string{
		fmt.Sprintf("blocks %d wrong 0", counted), "disk interrupts arrive", "random 64",
		"address " + mac + " carrier 1", "the network answers", "the same guest", fmt.Sprintf("forks told %d", restores), "cpus 2 clock kvm-clock",
		"CPU mask 1 works", "CPU mask 2 works", "SCRIPT-ENDED",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q on the console", want)
		}
	}
	if strings.Contains(text, "complaint:") || strings.Contains(text, "WRITE FAILED") {
		t.Error("the guest complains")
	}
	if t.Failed() || testing.Verbose() {
		t.Log(text)
	}
	return counted
}

// heldPages are the runs of pages in the balloon.
func heldPages(m *VM) []uint64 {
	for _, d := range m.pci.devices {
		if d.held != nil {
			return d.held.saved()
		}
	}
	return nil
}

// waitBalloon returns when the guest has made the balloon as large as that.
func waitBalloon(ctx context.Context, m *VM, bytes uint64) error {
	for {
		b, err := m.Balloon()
		if err != nil || b.ActualBytes == bytes {
			return err
		}
		select {
		case <-m.ended:
			return fmt.Errorf("balloon of %d bytes at the guest's end, want %d", b.ActualBytes, bytes)
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("balloon of %d bytes, want %d", b.ActualBytes, bytes), ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// checkCounts reads the counts off a console, and returns the last: each is there
// once, in order, and the uptime with them never steps back.
func checkCounts(t *testing.T, text string) (counted int) {
	t.Helper()
	last := 0.0
	for line := range strings.Lines(text) {
		var n int
		var up float64
		if k, _ := fmt.Sscanf(line, "count %d up %f", &n, &up); k != 2 {
			continue
		}
		if n != counted+1 {
			t.Errorf("count %d after %d", n, counted)
		}
		if up < last {
			t.Errorf("uptime %.2f s at count %d, %.2f s before", up, n, last)
		}
		counted, last = n, up
	}
	return counted
}

// TestLinuxRestoreLater: a guest that is restored long after it was saved does
// not notice by its uptime, or jumps when it shall.
func TestLinuxRestoreLater(t *testing.T) {
	requireLinux(t)
	for _, advance := range []bool{false, true} {
		t.Run(fmt.Sprintf("advance=%v", advance), func(t *testing.T) {
			c := linuxConfig(t, "6.12-cloud", `i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo "count $i up $(cut -d' ' -f1 /proc/uptime)"; usleep 20000; done`)
			c.Memory.Size = 128 << 20
			ctx, cancel := context.WithTimeout(t.Context(), linuxTimeout)
			defer cancel()
			out := newConsole()
			m := newVM(t, c, out)
			if err := errors.Join(m.Start(ctx), out.waitFor(ctx, "count 10 "), m.Pause(ctx), m.platform.drain()); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			sections := saveOf(t, m)
			changeClock(t, sections, -24*time.Hour)
			r, err := Restore(ctx, c, sections, copyOf(m.mem), RestoreOptions{Options: Options{Console: out}, AdvanceClock: advance})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if err := r.Resume(ctx); err != nil {
				t.Fatal(err)
			}
			exit, err := r.Wait(ctx)
			if err != nil || exit.Reason != ExitPowerOff {
				t.Errorf("exit %+v, %v", exit, err)
			}
			if n := checkCounts(t, out.String()); n != 60 {
				t.Errorf("counted to %d, want 60", n)
			}
			last, i := 0.0, strings.LastIndex(out.String(), "count 60 up ")
			if i >= 0 {
				_, _ = fmt.Sscanf(out.String()[i:], "count 60 up %f", &last)
			}
			if jumped := last > 12*3600; jumped != advance {
				t.Errorf("uptime %.2f s at the end", last)
			}
			if t.Failed() {
				t.Log(out)
			}
		})
	}
}

// TestLinuxRestoreWallClock: a guest with ditto's own process 1 has the right time
// of day again soon after a restore, while the time since its boot goes on.
func TestLinuxRestoreWallClock(t *testing.T) {
	requireLinux(t)
	const asleep = time.Hour
	script := `while true; do echo "wall $(date) up $(cat /proc/uptime)"; sleep 0.2; done`
	c := linuxConfig(t, "6.12-cloud", "")
	k, err := kernel.NewStore("", nil).Find("6.12-cloud")
	if err != nil {
		t.Fatal(err)
	}
	image, err := material.URoot(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	c.Initrd = image.Path
	c.Memory.Size = 512 << 20
	c.Cmdline.Append = "quiet loglevel=4 panic=-1 ditto.net=off ditto.run64=" + base64.StdEncoding.EncodeToString([]byte(script))
	ctx, cancel := context.WithTimeout(t.Context(), linuxTimeout)
	defer cancel()
	out := newConsole()
	m := newVM(t, c, out)
	fatal := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	fatal(m.Start(ctx))
	for begun, _ := lastTimes(out.String()); begun.IsZero(); begun, _ = lastTimes(out.String()) {
		select {
		case <-out.more:
		case <-ctx.Done():
			fatal(ctx.Err())
		}
	}
	fatal(errors.Join(m.Pause(ctx), m.platform.drain()))
	sections := saveOf(t, m)
	var platform state.Platform // for the guest the same as if the host's clock had gone on
	alter(t, sections, "platform", &platform, func() { platform.Rtc.OffsetNs += int64(asleep) })
	later := newConsole()
	r, err := Restore(ctx, c, sections, copyOf(m.mem), RestoreOptions{Options: Options{Console: later}, NewGenerationID: true})
	fatal(err)
	defer r.Close()
	fatal(r.Resume(ctx))
	if err := later.waitFor(ctx, "ditto-init: clock moved="); err != nil {
		t.Fatalf("%v\n%s", err, later)
	}
	seen := strings.Count(later.String(), "wall ")
	for strings.Count(later.String(), "wall ") < seen+3 {
		select {
		case <-later.more:
		case <-ctx.Done():
			fatal(ctx.Err())
		}
	}
	wallBefore, upBefore := lastTimes(out.String())
	wall, up := lastTimes(later.String())
	if host := time.Now().Add(asleep); wall.Sub(wallBefore) < asleep || wall.After(host) {
		t.Errorf("the wall clock moved from %s to %s; the host's is at %s", wallBefore, wall, host)
	}
	if jumped := up - upBefore; jumped < 0 || jumped > asleep/2 {
		t.Errorf("the time since the boot moved by %s", jumped)
	}
	if strings.Contains(later.String(), "unstable") {
		t.Error("the guest complains of its clocks")
	}
	if t.Failed() || testing.Verbose() {
		t.Logf("%s\n%s", out, later)
	}
	if !t.Failed() {
		labtest.Proof(t, "restore-clock", "restored an hour later, a guest moves its wall clock by %s while its uptime moves by %s", wall.Sub(wallBefore), (up - upBefore).Round(time.Second))
	}
}

// lastTimes returns what the last whole line of a console with times says, the wall
// clock in whole seconds.
func lastTimes(text string) (wall time.Time, up time.Duration) {
	for line := range strings.Lines(text) {
		date, uptime, ok := strings.Cut(strings.TrimSpace(line), " up ")
		t, err := time.Parse("wall "+time.UnixDate, date)
		var seconds float64
		if n, _ := fmt.Sscanf(uptime, "%f", &seconds); ok && n == 1 && err == nil {
			wall, up = t, time.Duration(seconds*float64(time.Second))
		}
	}
	return wall, up
}
