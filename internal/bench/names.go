package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"ditto.vm/memory"
	"ditto.vm/vmm/api"
)

// What the guest of namesFrames reads, and how long it idles.
const (
	namesReadMiB = 300
	namesIdle    = 20 * time.Second
)

// namesFrames: a Linux guest reads 300 MiB into its page cache and idles while
// its pages are named and the names proven.
func namesFrames() Benchmark {
	const left, host = "large-left", "large-host"
	return Benchmark{
		Name: "names-frames",
		Title: fmt.Sprintf("Large frames left of a Debian guest that has read %d MiB and idled for %s, while its pages are named",
			namesReadMiB, namesIdle),
		Where: Lab, LabCPUs: 1, NeedsDisk: true, Rounds: 5, Warmups: 1,
		OpenLimit: 5 * time.Minute, RunLimit: 3 * time.Minute,
		Metrics: []Metric{
			{left, "%", Higher, "the share of 2 MiB entries in what KVM maps, of that before the idle time; the guest reads its cache before each count"},
			{host, "%", Higher, "large frames in the host's page tables, of those before the idle time"},
			{"proven", "pages", Higher, "names that are proven at the end"},
		},
		Targets: []Target{{Metric: left, Contestant: nameDitto, Limit: 95}},
		Open:    openNamesFrames,
	}
}

// namesSession holds the running guests and asks ditto about them.
type namesSession struct {
	*pair
	ditto string
}

func openNamesFrames(ctx context.Context, env *Env) (Session, error) {
	if err := env.need("Ditto", env.Ditto, "Kernel", env.Kernel, "Initrd", env.Initrd, "RootDisk", env.RootDisk); err != nil {
		return nil, err
	}
	path := filepath.Join(env.Scratch, "names.raw")
	if err := fillFile(path, namesReadMiB<<20); err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	var cmds []launch
	for _, way := range []struct{ name, tracker string }{{nameDitto, "auto"}, {"ditto-kvm-log", "kvm-log"}} {
		g := loadGuest(env)
		g.disks = append(g.disks, guestDisk{path: path, readOnly: true, cache: "writeback"})
		cmds = append(cmds, launch{way.name, append(dittoArgs(env.Ditto, g), "--name", way.name, "--tracker", way.tracker)})
	}
	p, err := openPair(ctx, cmds, func() error { return os.Remove(path) })
	if err != nil {
		return nil, err
	}
	return namesSession{p, env.Ditto}, nil
}

// Run implements [Session].
func (s namesSession) Run(ctx context.Context, i int) (Sample, error) {
	const read = "dd if=/dev/vdb of=/dev/null bs=1M 2>/dev/null"
	g := s.guests[i]
	for _, line := range []string{"echo 3 > /proc/sys/vm/drop_caches", read, read} {
		if _, err := g.run(ctx, line); err != nil {
			return nil, err
		}
	}
	before, err := s.stats(ctx, i)
	if err != nil {
		return nil, err
	}
	select {
	case <-time.After(namesIdle):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if _, err := g.run(ctx, read); err != nil {
		return nil, err
	}
	after, err := s.stats(ctx, i)
	if err != nil {
		return nil, err
	}
	if before.Pages2M == 0 || before.Frames.Large == 0 {
		return nil, errors.New("the guest had no large frames")
	}
	return Sample{
		"large-left": 100 * largeShare(after) / largeShare(before),
		"large-host": 100 * float64(after.Frames.Large) / float64(before.Frames.Large),
		"proven":     float64(after.Names.Counters["named_proven"]),
	}, nil
}

// largeShare is how much of the memory that KVM maps it maps by 2 MiB entries.
func largeShare(s api.Stats) float64 {
	large := float64(s.Pages2M) * (memory.LargeFrameSize / memory.PageSize)
	return large / (large + float64(s.Pages4K))
}

// stats asks a running VM, which is called like its contestant.
func (s namesSession) stats(ctx context.Context, i int) (stats api.Stats, err error) {
	out, err := output(ctx, s.ditto, "stats", "--json", s.cmds[i].name)
	if err != nil {
		return stats, err
	}
	return stats, json.Unmarshal(out, &stats)
}
