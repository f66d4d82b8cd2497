package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

const (
	// manyClones run side by side.
	manyClones = 16
	// clonesIdle is how long they do so before they are measured: what is
	// fetched in the background has come by then.
	clonesIdle = time.Minute
	// clonePrefix begins their names.
	clonePrefix = "clone"
)

// clonesPSS: what many machines made of one snapshot take.
func clonesPSS() Benchmark {
	const beyond, pss, written, own = "beyond", "pss", "written", "own"
	one, many := clonesName(1), clonesName(manyClones)
	return Benchmark{
		Name: "clones-pss",
		Title: fmt.Sprintf("Memory of %d clones of the guest of snapshot-anchor, idle for %s, beside that of one",
			manyClones, clonesIdle),
		Where: Lab, LabCPUs: 1, Rounds: 5, Warmups: 1,
		OpenLimit: 10 * time.Minute, RunLimit: 15 * time.Minute,
		Metrics: []Metric{
			{beyond, "MiB", Lower, "guest RAM of all, beyond what they wrote: pss less written"},
			{pss, "MiB", Lower, "guest RAM of all: the sum of Pss (proc_pid_smaps(5)) of the mappings that are guest RAM, as ditto stats tells it"},
			{written, "MiB", Lower, "of that, pages mapped from the snapshot's or the disks' files that were written since: Anonymous of these mappings. What was written of other pages is not told from what was fetched, and counts as the former"},
			{own, "MiB", Lower, "anonymous memory of the VMMs themselves, all together"},
		},
		// As much as one takes, what it wrote apart on both sides.
		Targets: []Target{{beyond, many, one, 1.25}},
		Open:    openClones,
	}
}

func clonesName(n int) string { return fmt.Sprintf("%d-clones", n) }

// clonesSession holds the snapshot.
type clonesSession struct {
	env           *Env
	dir, snapshot string
	numbers       []int // of clones, by contestant
}

func openClones(ctx context.Context, env *Env) (_ Session, err error) {
	if err := needAnchor(env); err != nil {
		return nil, err
	}
	s := &clonesSession{env: env, numbers: []int{1, manyClones}}
	if s.dir, err = os.MkdirTemp(env.Scratch, "clones-"); err != nil {
		return nil, err
	}
	s.snapshot = filepath.Join(s.dir, "snapshot")
	if err := s.save(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// save saves the guest when it has read its files and is idle.
func (s *clonesSession) save(ctx context.Context) error {
	initrd, files, err := makeAnchor(ctx, s.env, s.dir)
	if err != nil {
		return err
	}
	disk := filepath.Join(s.dir, "disk.qcow2")
	if err := overlayOn(ctx, files, disk); err != nil {
		return err
	}
	g := anchorGuest(s.env, initrd, disk)
	const name = "anchor"
	p, err := openPair(ctx, []launch{{name, append(dittoArgs(s.env.Ditto, g), "--name", name)}}, nil)
	if err != nil {
		return err
	}
	defer func() { _ = p.Close() }()
	if err := prepareAnchor(ctx, p); err != nil {
		return err
	}
	_, err = output(ctx, s.env.Ditto, "snapshot", name, s.snapshot, "--stop")
	return err
}

// Contestants implements [Session].
func (s *clonesSession) Contestants() []Contestant {
	var list []Contestant
	for _, n := range s.numbers {
		list = append(list, Contestant{clonesName(n), shellLine(s.command(n))})
	}
	return list
}

func (s *clonesSession) command(n int) []string {
	return []string{s.env.Ditto, "clone", s.snapshot, "-n", fmt.Sprint(n), "--name", clonePrefix, "--json"}
}

// Run implements [Session].
func (s *clonesSession) Run(ctx context.Context, i int) (sample Sample, err error) {
	out, err := output(ctx, s.command(s.numbers[i])...)
	var clones []struct{ Name string }
	if bad := json.Unmarshal(out, &clones); err == nil {
		err = bad
	}
	defer func() {
		for _, c := range clones {
			_, stopped := output(context.WithoutCancel(ctx), s.env.Ditto, "kill", c.Name)
			err = errors.Join(err, stopped)
		}
	}()
	if err != nil {
		return nil, err
	}
	select {
	case <-time.After(clonesIdle):
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	sample = Sample{}
	for _, c := range clones {
		out, err := output(ctx, s.env.Ditto, "stats", "--json", c.Name)
		if err != nil {
			return nil, err
		}
		if err := addClone(sample, out); err != nil {
			return nil, fmt.Errorf("%s: %w", c.Name, err)
		}
	}
	return sample, nil
}

// addClone adds what a clone's statistics say.
func addClone(sample Sample, stats []byte) error {
	var s struct {
		PSS     *uint64 `json:"guest_pss_bytes"`
		Written *uint64 `json:"guest_copied_bytes"`
		Own     *uint64 `json:"anonymous_bytes"`
	}
	if err := json.Unmarshal(stats, &s); err != nil {
		return err
	}
	if s.PSS == nil || s.Written == nil || s.Own == nil {
		return errors.New("statistics without memory")
	}
	const mib = 1 << 20
	sample["pss"] += float64(*s.PSS) / mib
	sample["written"] += float64(*s.Written) / mib
	sample["beyond"] = sample["pss"] - sample["written"]
	sample["own"] += float64(*s.Own) / mib
	return nil
}

// Close implements [Session].
func (s *clonesSession) Close() error { return os.RemoveAll(s.dir) }
