package vmm

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"

	"ditto.vm/images/kernel"
	"ditto.vm/internal/labtest"
	"ditto.vm/memory"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/kvm"
)

// linuxTimeout bounds one Linux guest; under emulation it takes ten seconds to
// reach user space, on a busy machine several times as long.
var linuxTimeout = time.Duration(labtest.Count(6, 20)) * time.Minute

// requireLinux skips where KVM cannot run a kernel. In the lab it always can.
func requireLinux(t testing.TB) {
	t.Helper()
	requireKVM(t)
	s, err := kvm.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	linux, err := s.ProbeLinux()
	if err != nil {
		t.Fatal(err)
	}
	if linux.OK {
		return
	}
	if labtest.Inside() {
		t.Fatal(linux.Reason)
	}
	t.Skipf("%s; try: make test, which runs this in the lab", linux.Reason)
}

// guestInit is the first process of a test guest: it mounts what a shell needs,
// loads the modules in order and runs /script.
const guestInit = `#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for m in $(cat /modules/order); do insmod /modules/$m || echo "insmod $m failed"; done
sh /script
echo SCRIPT-ENDED
poweroff -f
`

// testInitrd writes an initramfs with busybox, a script and the modules named.
func testInitrd(t testing.TB, k kernel.Kernel, script string, modules ...string) string {
	t.Helper()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skipf("%v; try: apt-get install busybox-static", err)
	}
	records := []cpio.Record{
		cpio.Directory("bin", 0o755), cpio.Directory("dev", 0o755), cpio.Directory("proc", 0o755),
		cpio.Directory("sys", 0o755), cpio.Directory("tmp", 0o755), cpio.Directory("modules", 0o755),
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.StaticFile("bin/busybox", string(busybox), 0o755),
		cpio.StaticFile("init", guestInit, 0o755),
		cpio.StaticFile("script", script, 0o644),
	}
	var order strings.Builder
	if len(modules) > 0 {
		loaded, err := k.Modules(modules...)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range loaded {
			records = append(records, cpio.StaticFile("modules/"+m.Name+".ko", string(m.Data), 0o644))
			order.WriteString(m.Name + ".ko\n")
		}
	}
	records = append(records, cpio.StaticFile("modules/order", order.String(), 0o644))
	var out bytes.Buffer
	w := cpio.Newc.Writer(&out)
	if err := cpio.WriteRecords(w, records); err != nil {
		t.Fatal(err)
	}
	if err := cpio.WriteTrailer(w); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "initrd.cpio")
	if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// linuxConfig boots a kernel of the cache with a script.
func linuxConfig(t testing.TB, spec, script string, modules ...string) config.Config {
	t.Helper()
	k, err := kernel.NewStore("", nil).Find(spec)
	if err != nil {
		t.Fatalf("%v; try: make test, which fetches the kernels", err)
	}
	c := config.Default()
	c.Name = "linux"
	c.CPUs = 2
	c.Memory.Size = 256 << 20
	c.Kernel = k.Image
	c.Initrd = testInitrd(t, k, script, modules...)
	c.Cmdline.Append = "quiet loglevel=4 panic=-1"
	c.Nets, c.RNG, c.Balloon.Enabled = nil, false, false
	return c
}

// waitFor returns when the console shows text.
func (c *consoleLog) waitFor(ctx context.Context, text string) error {
	for !strings.Contains(c.String(), text) {
		select {
		case <-c.more:
		case <-ctx.Done():
			return fmt.Errorf("waiting for %q: %w", text, ctx.Err())
		}
	}
	return nil
}

// runLinux boots c until it ends.
func runLinux(t testing.TB, c config.Config) (string, Exit) {
	t.Helper()
	requireLinux(t)
	ctx, cancel := context.WithTimeout(t.Context(), linuxTimeout)
	defer cancel()
	out := newConsole()
	m := newVM(t, c, out)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	exit, err := m.Wait(ctx)
	if err != nil {
		t.Fatalf("%v; %s; console:\n%s", err, m.whereAbouts(t), out)
	}
	return out.String(), exit
}

// whereAbouts says where the vCPUs of a guest that does not end are.
func (m *VM) whereAbouts(t testing.TB) string {
	var s strings.Builder
	if m.Info().State == api.Created {
		return "the VM has not started"
	}
	for _, c := range m.vcpus {
		if err := c.do(context.WithoutCancel(t.Context()), func() error {
			mp, err := c.kvm.MPState()
			fmt.Fprintf(&s, "vCPU %d, paused %v, MP state %d %v: %s\n", c.id, c.paused, mp, err, c.registers())
			return nil
		}); err != nil {
			fmt.Fprintf(&s, "vCPU %d: %v\n", c.id, err)
		}
	}
	return s.String()
}

func TestLinuxBoots(t *testing.T) {
	requireLinux(t)
	for _, spec := range []string{"6.12-cloud", "6.12", "6.1-cloud", "6.1"} {
		t.Run(spec, func(t *testing.T) {
			out, exit := runLinux(t, linuxConfig(t, spec, `
echo "kernel $(uname -r) cpus $(nproc)"
echo "clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo "pci $(ls /sys/bus/pci/devices | wc -l) host bridge $(cat /sys/bus/pci/devices/0000:00:00.0/class)"
dmesg | grep -iE 'bug|warn|error|fail' | head -20
`))
			if exit.Reason != ExitPowerOff {
				t.Errorf("exit %+v, want a power-off", exit)
			}
			for _, want := range []string{"cpus 2", "clock kvm-clock", "host bridge 0x060000", "SCRIPT-ENDED"} {
				if !strings.Contains(out, want) {
					t.Errorf("no %q on the console:\n%s", want, out)
				}
			}
			if t.Failed() || testing.Verbose() {
				t.Log(out)
			}
		})
	}
}

func TestLinuxSeesCPUsAndMemory(t *testing.T) {
	requireLinux(t)
	c := linuxConfig(t, "6.12-cloud", `
echo "cpus $(nproc)"
for i in 0 1 2 3; do taskset $(printf '%x' $((1 << i))) sh -c 'n=0; while [ $n -lt 20000 ]; do n=$((n+1)); done'; done
awk '/^cpu[0-9]/ { if ($2+$3+$4 > 0) n++ } END { print "used cpus", n }' /proc/stat
awk '/MemTotal/ { print "mem", $2 }' /proc/meminfo
echo "above 4 GiB $(grep -c '^0*1[0-9a-f]\{8\}-.*System RAM' /proc/iomem)"
mount -t tmpfs -o size=5400m t /tmp
dd if=/dev/zero of=/tmp/big bs=1M count=5200 2>/dev/null
echo "wrote $(stat -c %s /tmp/big)"
`)
	c.CPUs = 4
	c.Memory.Size = 6 << 30
	out, exit := runLinux(t, c)
	if exit.Reason != ExitPowerOff {
		t.Errorf("exit %+v", exit)
	}
	for _, want := range []string{"cpus 4", "used cpus 4", "above 4 GiB 1", "wrote 5452595200"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q on the console:\n%s", want, out)
		}
	}
	var kib uint64
	if i := strings.Index(out, "mem "); i < 0 {
		t.Errorf("no memory size:\n%s", out)
	} else if _, err := fmt.Sscanf(out[i:], "mem %d", &kib); err != nil || kib < (6<<20)*95/100 {
		t.Errorf("guest sees %d KiB of 6 GiB, %v", kib, err)
	}
}

func TestLinuxReboots(t *testing.T) {
	requireLinux(t)
	c := linuxConfig(t, "6.12-cloud", `echo "BOOTED $(head -c 6 /dev/vda)"; reboot -f; sleep 60`, virtioModules...)
	c.RebootLimit = 2
	c.Disks = []config.Disk{{Path: testDisk(t, "disk-0", 1<<20)}}
	c.RNG, c.Balloon.Enabled = true, true
	out, exit := runLinux(t, c)
	if exit.Reason != ExitReboot {
		t.Errorf("exit %+v, want the reboot limit", exit)
	}
	if got := strings.Count(out, "BOOTED disk-0"); got != 3 {
		t.Errorf("booted %d times, want 3:\n%s", got, out)
	}
}

func TestLinuxPowerButton(t *testing.T) {
	requireLinux(t)
	c := linuxConfig(t, "6.12-cloud", `
dev=$(grep -l 'Power Button' /sys/class/input/input*/name | head -1)
echo "found $dev"
echo READY
dd if=/dev/input/event0 of=/dev/null bs=24 count=1 2>/dev/null
echo PRESSED
`, "button", "evdev")
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
	if err := m.Stop(ctx, linuxTimeout); err != nil {
		t.Fatal(err)
	}
	if exit, err := m.Wait(ctx); err != nil || exit.Reason != ExitPowerOff || !strings.Contains(out.String(), "PRESSED") {
		t.Errorf("exit %+v, %v; console:\n%s", exit, err, out)
	}
}

func TestLinuxPanicIsReported(t *testing.T) {
	requireLinux(t)
	c := linuxConfig(t, "6.12", `echo c > /proc/sysrq-trigger; sleep 60`, "pvpanic-mmio")
	out, exit := runLinux(t, c)
	if exit.Reason != ExitPanicked {
		t.Errorf("exit %+v, want a panic", exit)
	}
	if !strings.Contains(out, "sysrq triggered crash") {
		t.Errorf("the panic is not on the console:\n%s", out)
	}
}

// TestLinuxPause: a paused guest makes no progress and goes on afterwards, its
// monotonic clock with it.
func TestLinuxPause(t *testing.T) {
	requireLinux(t)
	c := linuxConfig(t, "6.12-cloud", `i=0; while [ $i -lt 200 ]; do echo "tick $i"; i=$((i+1)); usleep 20000; done`)
	out := newConsole()
	m := newVM(t, c, out)
	ctx, cancel := context.WithTimeout(t.Context(), linuxTimeout)
	defer cancel()
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	for _, tick := range []string{"tick 5\r", "tick 60\r", "tick 120\r"} {
		if err := out.waitFor(ctx, tick); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if err := m.Pause(ctx); err != nil {
			t.Fatal(err)
		}
		if err := m.platform.drain(); err != nil {
			t.Fatal(err)
		}
		before := m.vcpuRuns()
		text := out.String()
		if got := m.vcpuRuns(); got != before || out.String() != text {
			t.Errorf("a paused guest went on: %d exits, %d before", got, before)
		}
		if err := m.Resume(ctx); err != nil {
			t.Fatal(err)
		}
	}
	exit, err := m.Wait(ctx)
	if err != nil || exit.Reason != ExitPowerOff || !strings.Contains(out.String(), "tick 199") {
		t.Errorf("exit %+v, %v:\n%s", exit, err, out)
	}
}

// vcpuRuns sums the exits of all vCPUs.
func (m *VM) vcpuRuns() (n uint64) {
	for _, c := range m.vcpus {
		for i := range c.counts {
			n += c.counts[i].Load()
		}
	}
	return n
}

// TestLinuxLargeFrames: with transparent huge pages a guest that touched its
// memory is mapped large for the most part.
func TestLinuxLargeFrames(t *testing.T) {
	requireLinux(t)
	c := linuxConfig(t, "6.12-cloud", `
mount -t tmpfs -o size=400m t /tmp
dd if=/dev/zero of=/tmp/f bs=1M count=300 2>/dev/null
echo TOUCHED; sleep 600`)
	c.Memory.Size = 512 << 20
	out := newConsole()
	m := newVM(t, c, out)
	ctx, cancel := context.WithTimeout(t.Context(), linuxTimeout)
	defer cancel()
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := out.waitFor(ctx, "TOUCHED"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	stats, err := m.Stats()
	if err != nil {
		t.Fatal(err)
	}
	large, small := stats.Pages2M*memory.LargeFrameSize, stats.Pages4K*memory.PageSize
	if large < 9*small || large < 256<<20 {
		t.Errorf("%d MiB mapped with 2 MiB entries, %d MiB with 4 KiB ones", large>>20, small>>20)
	}
	t.Logf("%d MiB large, %d MiB small, resident %d bytes", large>>20, small>>20, stats.GuestResidentBytes)
}

// TestLinuxBootsLeaveNothing: descriptors, goroutines and memory are as before
// after several Linux guests with devices, in one process.
func TestLinuxBootsLeaveNothing(t *testing.T) {
	requireLinux(t)
	boots := labtest.Count(2, 10)
	c := linuxConfig(t, "6.12-cloud", `head -c 1048576 /dev/vda | wc -c`, virtioModules...)
	c.Disks = []config.Disk{{Path: testDisk(t, "disk", 4<<20)}}
	c.RNG, c.Balloon.Enabled = true, true
	boot := func() {
		ctx, cancel := context.WithTimeout(t.Context(), linuxTimeout)
		defer cancel()
		out := newConsole()
		m, err := New(ctx, c, Options{Console: out})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Start(ctx); err != nil {
			t.Fatal(err)
		}
		if exit, err := m.Wait(ctx); err != nil || exit.Reason != ExitPowerOff || !strings.Contains(out.String(), "1048576") {
			t.Fatalf("exit %+v, %v:\n%s", exit, err, out)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	boot() // whatever the runtime keeps for good
	fds, goroutines, mapped := countFDs(t), runtime.NumGoroutine(), mappings(t)
	for range boots {
		boot()
	}
	if got := countFDs(t); got != fds {
		t.Errorf("%d descriptors after %d boots, %d before", got, boots, fds)
	}
	if got := runtime.NumGoroutine(); got != goroutines {
		t.Errorf("%d goroutines after %d boots, %d before", got, boots, goroutines)
	}
	if got := mappings(t); got >= mapped+4*boots {
		t.Errorf("%d mappings after %d boots, %d before", got, boots, mapped)
	}
	labtest.Proof(t, "boots-linux", "%d boots, %d descriptors before and %d after, %d and %d goroutines", boots, fds, countFDs(t), goroutines, runtime.NumGoroutine())
}
