package bench

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"time"
)

// nameBare is ditto with a processor, memory, a serial port and nothing else.
const nameBare = "ditto-bare"

// nativeMemoryMiB is far more than the VMM maps for itself, so that the
// guest's memory stands out in smaps.
const nativeMemoryMiB = 384

// nativeStart: from exec to the first byte of a bare-metal payload.
func nativeStart() Benchmark {
	return Benchmark{
		Name:  "native-start",
		Title: "From exec to the first port write of a bare-metal payload",
		Where: Native, Rounds: 25, Warmups: 3,
		Metrics: []Metric{
			{"first-write", "ms", Lower, "exec of ditto to the first byte of the guest on ditto's standard output"},
		},
		Targets: []Target{
			{Metric: "first-write", Contestant: nameDitto, Limit: 15},
			{Metric: "first-write", Contestant: nameBare, Limit: 15},
		},
		OpenLimit: time.Minute, RunLimit: 20 * time.Second,
		Open: func(_ context.Context, env *Env) (Session, error) {
			if err := env.need("Ditto", env.Ditto); err != nil {
				return nil, err
			}
			return &launches{cmds: nativeWays(env, "payload:hello:"+entryGreeting), measure: measureFirstWrite}, nil
		},
	}
}

// nativeMemory: what the VMM needs besides the guest's memory.
func nativeMemory() Benchmark {
	return Benchmark{
		Name:  "native-memory",
		Title: "Resident memory of a running VMM, without the guest's",
		Where: Native, Rounds: 5, Warmups: 1,
		Metrics: []Metric{
			{"anonymous", "MiB", Lower, "anonymous memory, from /proc/PID/smaps"},
			{"resident", "MiB", Lower, "all resident memory, with the program's own pages in the page cache"},
		},
		Targets: []Target{
			{Metric: "anonymous", Contestant: nameDitto, Limit: 12},
			{Metric: "resident", Contestant: nameDitto, Limit: 20},
			{Metric: "anonymous", Contestant: nameBare, Limit: 12},
			{Metric: "resident", Contestant: nameBare, Limit: 20},
		},
		OpenLimit: time.Minute, RunLimit: 20 * time.Second,
		Open: func(_ context.Context, env *Env) (Session, error) {
			if err := env.need("Ditto", env.Ditto); err != nil {
				return nil, err
			}
			return &launches{cmds: nativeWays(env, "payload:spin"), measure: measureMemory}, nil
		},
	}
}

// nativeWays is ditto as it comes, and with every device left out that can be.
func nativeWays(env *Env, kernel string) []launch {
	memory := strconv.Itoa(nativeMemoryMiB) + "M"
	return []launch{
		{nameDitto, []string{env.Ditto, "run", "--kernel", kernel, "--memory", memory}},
		{nameBare, dittoArgs(env.Ditto, spec{kernel: kernel, memoryMiB: nativeMemoryMiB, cpus: 1})},
	}
}

func measureFirstWrite(ctx context.Context, c *child) (Sample, error) {
	_, at, err := c.waitFor(ctx, 0, entryGreeting)
	if err != nil {
		return nil, err
	}
	return Sample{"first-write": milliseconds(at.Sub(c.started))}, nil
}

// measureMemory looks at the process when the guest has run for a while.
func measureMemory(ctx context.Context, c *child) (Sample, error) {
	if err := c.settle(ctx, time.Second); err != nil {
		return nil, err
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", c.cmd.Process.Pid))
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	m, err := readSmaps(f, nativeMemoryMiB<<20)
	if err != nil {
		return nil, err
	}
	const mib = 1 << 20
	return Sample{"anonymous": float64(m.anonymous) / mib, "resident": float64(m.resident) / mib}, nil
}

// settle lets the program run for d.
func (c *child) settle(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-c.ended:
		return c.explain(errEnded)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
