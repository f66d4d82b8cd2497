package vmm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/boot/bzimage"

	"ditto.vm/internal/labtest"
	"ditto.vm/vmm/config"
)

// TestLinuxPlatform: Linux finds every platform device where ACPI says, with
// the driver it has for it, and has nothing to complain about.
func TestLinuxPlatform(t *testing.T) {
	requireLinux(t)
	for _, spec := range []string{"6.12", "6.1-cloud"} {
		t.Run(spec, func(t *testing.T) {
			out, exit := runLinux(t, linuxConfig(t, spec, `
dmesg | grep -vi 'command line' | grep -iE 'ACPI (BIOS )?(Error|Warning)|firmware bug|spurious|nobody cared' | sed 's/^/complaint: /'
dmesg | grep -vi 'command line' | grep -iE 'acpi|rtc|ttyS|ECAM|mmconfig|vmgenid'
for d in /sys/bus/acpi/devices/*; do echo "acpi device $(basename $d) $(cat $d/path 2>/dev/null)"; done
for d in /sys/bus/platform/drivers/acpi-ged/*:*; do echo "ged $(basename $d)"; done
cat /proc/interrupts
grep -E 'ECAM|MMCONFIG|pnp' /proc/iomem
echo "uart $(cat /sys/class/tty/ttyS0/type) irq $(cat /sys/class/tty/ttyS0/irq)"
echo "rtc $(cat /sys/class/rtc/rtc0/name)"
a=$(cat /sys/class/rtc/rtc0/since_epoch); b=$(date +%s); d=$((a-b)); echo "rtc is $d seconds ahead"
hwclock -u -s && echo "hwclock read it"
echo "tables $(ls /sys/firmware/acpi/tables | tr '\n' ' ')"
`))
			if exit.Reason != ExitPowerOff {
				t.Errorf("exit %+v, want a power-off", exit)
			}
			for _, want := range []string{
				"PNP0501", "ACPI0013", "PNP0C0C", "PNP0A08", "QEMU0001", "DITT0001", "PNP0B00",
				"ged ACPI0013", "uart 4", "rtc rtc_cmos", "hwclock read it", "tables APIC DSDT FACP MCFG", "SCRIPT-ENDED",
			} {
				if !strings.Contains(out, want) {
					t.Errorf("no %q on the console", want)
				}
			}
			if strings.Contains(out, "complaint:") {
				t.Error("Linux has something to complain about")
			}
			near := false
			for _, seconds := range []string{"-1", "0", "1"} {
				near = near || strings.Contains(out, "rtc is "+seconds+" seconds")
			}
			if !near {
				t.Error("the guest's clock and its RTC disagree")
			}
			if t.Failed() || testing.Verbose() {
				t.Log(out)
			}
		})
	}
}

// TestLinuxBootsByPVH boots the ELF file inside a bzImage.
func TestLinuxBootsByPVH(t *testing.T) {
	requireLinux(t)
	c := linuxConfig(t, "6.12-cloud", `echo "by PVH: $(dmesg | grep -c 'Booting paravirtualized kernel')"`)
	b, err := os.ReadFile(c.Kernel)
	if err != nil {
		t.Fatal(err)
	}
	var bz bzimage.BzImage
	if err := bz.UnmarshalBinary(b); err != nil {
		t.Fatal(err)
	}
	c.Kernel = filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(c.Kernel, bz.KernelCode, 0o600); err != nil {
		t.Fatal(err)
	}
	out, exit := runLinux(t, c)
	if exit.Reason != ExitPowerOff || !strings.Contains(out, "by PVH: 1") {
		t.Errorf("exit %+v; console:\n%s", exit, out)
	}
}

// corpusEnds are the console's words for the end of a kernel's own work: it ran
// a program, or found none that its configuration allows it to run.
var corpusEnds = []string{"USER SPACE", "No working init found", "Unable to mount root fs"}

// TestLinuxCorpus boots the bzImages of u-root's module, in every compression
// that Linux knows, as far as their configuration allows: to user space, or to
// the panic of a kernel that can read no initramfs or run no program of it.
func TestLinuxCorpus(t *testing.T) {
	requireLinux(t)
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/u-root/u-root").Output()
	if err != nil {
		t.Fatalf("where is u-root? %v; try: go mod download github.com/u-root/u-root", err)
	}
	images, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(dir)), "pkg/boot/bzimage/testdata/bz[iI]mage*"))
	if err != nil || len(images) == 0 {
		t.Fatalf("no bzImages: %v", err)
	}
	// At a small count: the smallest one, which has no ACPI.
	var far []string
	for _, image := range images[:labtest.Count(1, len(images))] {
		t.Run(filepath.Base(image), func(t *testing.T) { far = append(far, filepath.Base(image)+" "+corpusBoot(t, image)) })
	}
	labtest.Proof(t, "boot-corpus", "%d images: %s", len(far), strings.Join(far, ", "))
}

// corpusBoot boots one image and returns where its own work ended.
func corpusBoot(t *testing.T, image string) string {
	c := linuxConfig(t, "6.12-cloud", `echo "USER SPACE"; reboot -f; sleep 60`)
	c.Kernel = image
	c.CPUs = 1
	c.OnReboot = config.RebootStop
	out := newConsole()
	m := newVM(t, c, out)
	m.source.cmdline = "console=ttyS0 earlyprintk=serial,ttyS0 panic=-1 " + corpusClock(t, image, m)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := out.waitForAny(ctx, m.ended, corpusEnds...); err != nil {
		t.Errorf("%v; the console ends in:\n%s", err, tail(out.String(), 40))
	}
	for _, end := range corpusEnds {
		if strings.Contains(out.String(), end) {
			return strings.TrimSpace(end)
		}
	}
	t.Errorf("the kernel's work did not end; the console ends in:\n%s", tail(out.String(), 40))
	return ""
}

// corpusClock returns a word for the command line of a kernel that may lack KVM's
// clock. Such kernels measure the CPU's frequency by reading timers, and
// distrust readings that take as long as a port access does on an emulated host.
func corpusClock(t *testing.T, image string, m *VM) string {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	version, err := bzimage.KVer(f)
	if err != nil {
		t.Fatal(err)
	}
	if strings.HasPrefix(version, "4.") {
		// It takes no frequency, but ticks without one if it finds the legacy
		// timer, which reduced ACPI would hide.
		return "acpi=off"
	}
	khz, err := m.vcpus[0].kvm.TSCKHz()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("tsc_early_khz=%d", khz)
}

// waitForAny returns when the console shows one of texts or ended is closed.
func (c *consoleLog) waitForAny(ctx context.Context, ended <-chan struct{}, texts ...string) error {
	for {
		for _, text := range texts {
			if strings.Contains(c.String(), text) {
				return nil
			}
		}
		select {
		case <-c.more:
		case <-ended:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("waiting for one of %q: %w", texts, ctx.Err())
		}
	}
}

// tail returns the last n lines of s.
func tail(s string, n int) string {
	lines := strings.Split(s, "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
