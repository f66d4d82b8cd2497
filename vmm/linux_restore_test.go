package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ditto.vm/internal/labtest"
	"ditto.vm/vmm/config"
)

// framePeer listens on a unix socket and says when a network has sent something.
func framePeer(t testing.TB) (path string, sent <-chan struct{}) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "net.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	first, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		var b [1]byte
		if _, err := c.Read(b[:]); err != nil {
			return
		}
		close(first)
		_, _ = io.Copy(io.Discard, c)
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return path, first
}

// countScript counts on the console and on the disk, and says at the end what
// became of everything.
const countScript = `
irqs() { grep 'virtio' /proc/interrupts | grep "$1" | awk '{ n += $2 + $3 } END { print n }'; }
ip addr add 10.9.8.7/24 dev eth0; ip link set eth0 up
i=0
while [ $i -lt %d ]; do
	i=$((i+1))
	echo "block $i" | dd of=/dev/vda bs=512 seek=$i conv=sync,fsync 2>/dev/null || echo "WRITE FAILED"
	echo "count $i up $(cut -d' ' -f1 /proc/uptime)"
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
echo "forks $(dmesg | grep -c 'virtual machine fork')"
echo "cpus $(grep -c ^processor /proc/cpuinfo) clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
for c in 1 2; do taskset $c sh -c 'a=0; while [ $a -lt 2000 ]; do a=$((a+1)); done' && echo "CPU mask $c works"; done
dmesg | grep -iE 'bug:|soft lockup|rcu.*stall|unstable|needs_reset|blocked for more|I/O error' | sed 's/^/complaint: /'
`

// TestProveLinuxRestore is not in the list of tests yet: of three restores within
// six seconds the guest's kernel tells two. Try:
// ditto-lab -- vmm.test -test.run TestProveLinuxRestore
//
// A guest with every device is saved and restored while it
// counts, and goes on: no time has passed for it, its disk, its network, its
// balloon and its timers work, and it knows that it is another.
func TestProveLinuxRestore(t *testing.T) {
	requireLinux(t)
	restores := labtest.Count(3, 10)
	every := 8
	c := linuxConfig(t, "6.12", fmt.Sprintf(countScript, (restores+1)*every), virtioModules...)
	c.Disks = []config.Disk{{Path: testDisk(t, "disk", 1<<20)}}
	peer, _ := framePeer(t)
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
		fatal(out.waitFor(ctx, fmt.Sprintf("count %d ", (i+1)*every)))
		fatal(waitBalloon(ctx, m, balloon))
		fatal(m.Pause(ctx))
		fatal(m.platform.drain())
		var sent <-chan struct{}
		next := c
		next.Name = fmt.Sprintf("restored-%d", i) // and yet the saved address
		peer, sent = framePeer(t)
		next.Nets = []config.Net{{Mode: config.NetSocket, Path: peer}}
		m = restoreOf(t, m, next, RestoreOptions{Options: Options{Console: out}, NewGenerationID: true})
		if b, err := m.Balloon(); err != nil || b.ActualBytes != balloon {
			t.Errorf("balloon %+v after the restore, %v", b, err)
		}
		fatal(m.Resume(ctx))
		select {
		case <-sent:
		case <-ctx.Done():
			fatal(fmt.Errorf("the network was not told: %w", ctx.Err()))
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
	checkCounts(t, text, (restores+1)*every)
	for _, want := range []string{
		fmt.Sprintf("blocks %d wrong 0", (restores+1)*every), "disk interrupts arrive", "random 64",
		"address " + mac + " carrier 1", fmt.Sprintf("forks %d", restores), "cpus 2 clock kvm-clock",
		"CPU mask 1 works", "CPU mask 2 works", "SCRIPT-ENDED",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q on the console", want)
		}
	}
	if strings.Contains(text, "complaint:") || strings.Contains(text, "WRITE FAILED") {
		t.Error("the guest complains")
	}
	if t.Failed() {
		t.Log(text)
	} else {
		labtest.Proof(t, "restore-linux", "a counting guest with disk, network, rng, balloon and console, saved and restored %d times: every count and block there, uptime without a step, %d forks noticed", restores, restores)
	}
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

// checkCounts reads the counts off a console: each is there once, in order, and
// the uptime with them never steps back.
func checkCounts(t *testing.T, text string, want int) {
	t.Helper()
	counted, last := 0, 0.0
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
	if counted != want {
		t.Errorf("counted to %d, want %d", counted, want)
	}
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
			checkCounts(t, out.String(), 60)
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
