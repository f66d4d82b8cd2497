package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"ditto.vm/guest/payload"
)

// The boot benchmarks' guest, and what the guest's first process says.
const (
	bootMemoryMiB = 512
	bootCPUs      = 1
	firstLine     = "ditto-init: start"
	bootCmdline   = "console=ttyS0 quiet panic=-1 reboot=t ditto.net=off"
	entryGreeting = "entered"
)

// Contestants' names.
const (
	nameDitto   = "ditto"
	nameMicroVM = "qemu-microvm"
	nameQ35     = "qemu-q35"
)

// bootLinux: from exec to the first line of user space.
func bootLinux() Benchmark {
	return Benchmark{
		Name:  "boot-linux",
		Title: fmt.Sprintf("From exec to the guest's first user-space line (%d vCPU, %d MiB)", bootCPUs, bootMemoryMiB),
		Where: Lab, LabCPUs: 1, Rounds: 9, Warmups: 1,
		Metrics: []Metric{
			{"first-line", "s", Lower, "exec of the VMM to the first line that process 1 writes on the console"},
			{"guest-uptime", "s", Lower, "CLOCK_BOOTTIME in the guest at that line"},
			{"before-guest", "s", Lower, "the difference: VMM start, firmware, loading, decompression"},
		},
		Targets: []Target{
			{"first-line", nameDitto, nameMicroVM, 1.05},
			{"first-line", nameDitto, nameQ35, 0.85},
		},
		OpenLimit: time.Minute, RunLimit: 90 * time.Second,
		Open: func(_ context.Context, env *Env) (Session, error) {
			if err := env.need("Ditto", env.Ditto, "QEMU", env.QEMU, "Kernel", env.Kernel, "Initrd", env.Initrd); err != nil {
				return nil, err
			}
			g := spec{kernel: env.Kernel, initrd: env.Initrd, cmdline: bootCmdline, memoryMiB: bootMemoryMiB, cpus: bootCPUs}
			return &launches{cmds: threeWays(env, g), measure: measureLinux}, nil
		},
	}
}

// bootEntry: from exec to the first instructions of a PVH image.
func bootEntry() Benchmark {
	return Benchmark{
		Name:  "boot-entry",
		Title: "From exec to the first port write of a PVH image of a few KiB",
		Where: Lab, LabCPUs: 1, Rounds: 9, Warmups: 1,
		Metrics: []Metric{
			{"entry", "ms", Lower, "exec of the VMM to the first byte that the image writes on the serial port"},
		},
		OpenLimit: time.Minute, RunLimit: 60 * time.Second,
		Open: func(_ context.Context, env *Env) (Session, error) {
			if err := env.need("Ditto", env.Ditto, "QEMU", env.QEMU); err != nil {
				return nil, err
			}
			program, err := payload.Hello(entryGreeting)
			if err != nil {
				return nil, err
			}
			image, err := program.ELF(bootMemoryMiB << 20)
			if err != nil {
				return nil, err
			}
			path := filepath.Join(env.Scratch, "entry.elf")
			if err := os.WriteFile(path, image, 0o644); err != nil {
				return nil, err
			}
			g := spec{kernel: path, memoryMiB: bootMemoryMiB, cpus: bootCPUs}
			return &launches{cmds: threeWays(env, g), measure: measureEntry, files: []string{path}}, nil
		},
	}
}

// threeWays is one guest under ditto and both machine types of QEMU.
func threeWays(env *Env, g spec) []launch {
	return []launch{
		{nameDitto, dittoArgs(env.Ditto, g)},
		{nameMicroVM, qemuArgs(env.QEMU, qemuMicroVM(), g)},
		{nameQ35, qemuArgs(env.QEMU, qemuQ35(), g)},
	}
}

// launch is one contestant that is started anew for every run.
type launch struct {
	name string
	args []string
}

// launches is a session whose every run starts a program and kills it when it
// has been measured.
type launches struct {
	cmds    []launch
	measure func(context.Context, *child) (Sample, error)
	files   []string // to remove at the end
}

func (l *launches) Contestants() []Contestant {
	out := make([]Contestant, len(l.cmds))
	for i, c := range l.cmds {
		out[i] = Contestant{Name: c.name, Command: shellLine(c.args)}
	}
	return out
}

func (l *launches) Run(ctx context.Context, i int) (Sample, error) {
	c, err := startChild(l.cmds[i].args, false)
	if err != nil {
		return nil, err
	}
	defer c.stop()
	return l.measure(ctx, c)
}

func (l *launches) Close() error {
	var all error
	for _, f := range l.files {
		all = errors.Join(all, os.Remove(f))
	}
	return all
}

func measureLinux(ctx context.Context, c *child) (Sample, error) {
	end, at, err := c.waitFor(ctx, 0, firstLine)
	if err != nil {
		return nil, err
	}
	eol, _, err := c.waitFor(ctx, end, "\n")
	if err != nil {
		return nil, err
	}
	total := at.Sub(c.started).Seconds()
	uptime, err := uptimeOf(c.out.slice(end, eol))
	if err != nil {
		return nil, err
	}
	return Sample{"first-line": total, "guest-uptime": uptime, "before-guest": total - uptime}, nil
}

// uptimeOf reads "uptime=SECONDS" of a line of the guest's init.
func uptimeOf(line string) (float64, error) {
	for _, word := range strings.Fields(line) {
		if value, ok := strings.CutPrefix(word, "uptime="); ok {
			return strconv.ParseFloat(value, 64)
		}
	}
	return 0, fmt.Errorf("no uptime in %q", line)
}

func measureEntry(ctx context.Context, c *child) (Sample, error) {
	_, at, err := c.waitFor(ctx, 0, entryGreeting[:1])
	if err != nil {
		return nil, err
	}
	return Sample{"entry": milliseconds(at.Sub(c.started))}, nil
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
