package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Guests of restoreNative: all of their memory but 64 MiB is written.
const (
	smallRestoreMiB = 256
	largeRestoreMiB = 4096
	unwrittenMiB    = 64
)

// memwriterAnswer is how a memory writer begins to say how far it is. It does so
// when it is sent an s.
const memwriterAnswer = "memwriter writes="

// restoreNative: from exec to the restored guest's answer, by the size of memory
// and the way it comes back.
func restoreNative() Benchmark {
	return Benchmark{
		Name: "restore-native",
		Title: fmt.Sprintf("From exec of the restore to the guest's first port write, with %d and %d MiB of unique pages",
			smallRestoreMiB-unwrittenMiB, largeRestoreMiB-unwrittenMiB),
		Where: Native, Rounds: 9, Warmups: 1,
		Metrics: []Metric{
			{"answer", "ms", Lower, "exec of ditto to the first byte with which the guest answers what waits on its console"},
			{"touched", "ms", Lower, "exec of ditto to the guest's word that it has looked at every page of its working set, of the small guest"},
		},
		Targets: []Target{
			{Metric: "answer", Contestant: "large-lazy", Limit: 20},
			{Metric: "answer", Contestant: "large-lazy", Against: "small-lazy", Limit: 1.5},
		},
		OpenLimit: 5 * time.Minute, RunLimit: time.Minute,
		Open: openRestoreNative,
	}
}

// restoreSession holds the snapshots.
type restoreSession struct {
	env  *Env
	dir  string
	ways []restoreWay
}

// restoreWay is one contestant.
type restoreWay struct {
	name, snapshot string
	flags          []string
	check          bool // let the guest look at all of its memory
}

func openRestoreNative(ctx context.Context, env *Env) (Session, error) {
	if err := env.need("Ditto", env.Ditto); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(env.Scratch, "restore-")
	if err != nil {
		return nil, err
	}
	s := &restoreSession{env: env, dir: dir}
	small, large := filepath.Join(dir, "small"), filepath.Join(dir, "large")
	for path, size := range map[string]int{small: smallRestoreMiB, large: largeRestoreMiB} {
		if err := s.save(ctx, path, size); err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	s.ways = []restoreWay{
		{"small-lazy", small, nil, true},
		{"small-prefetch", small, []string{"--prefetch"}, true},
		{"small-eager", small, []string{"--eager"}, true},
		{"large-lazy", large, nil, false},
	}
	return s, nil
}

// save runs a guest until it has written its memory, and saves it.
func (s *restoreSession) save(ctx context.Context, path string, sizeMiB int) error {
	kernel := fmt.Sprintf("payload:memwriter:size=%dM,words=512,order=sequential,rate=1000000,seed=7", sizeMiB-unwrittenMiB)
	name := filepath.Base(path)
	c, err := startChild(append(dittoArgs(s.env.Ditto, spec{kernel: kernel, memoryMiB: sizeMiB, cpus: 1}), "--name", name), true)
	if err != nil {
		return err
	}
	defer c.stop()
	pages := uint64(sizeMiB-unwrittenMiB) << 8
	for written, from := uint64(0), 0; written < pages; {
		if _, err := c.stdin.WriteString("s"); err != nil {
			return c.explain(err)
		}
		end, _, err := c.waitFor(ctx, from, memwriterAnswer)
		if err != nil {
			return err
		}
		eol, _, err := c.waitFor(ctx, end, "\n")
		if err != nil {
			return err
		}
		if _, err := fmt.Sscanf(c.out.slice(end, eol), "%x", &written); err != nil {
			return fmt.Errorf("answer of the guest: %w: %q", err, c.out.slice(end, eol))
		}
		from = eol
		time.Sleep(50 * time.Millisecond)
	}
	_, err = output(ctx, s.env.Ditto, "snapshot", name, path, "--stop")
	return err
}

// Contestants implements [Session].
func (s *restoreSession) Contestants() []Contestant {
	list := make([]Contestant, len(s.ways))
	for i, w := range s.ways {
		list[i] = Contestant{w.name, shellLine(s.command(w))}
	}
	return list
}

func (s *restoreSession) command(w restoreWay) []string {
	return append([]string{s.env.Ditto, "restore", w.snapshot, "--name", restoredName}, w.flags...)
}

// Run implements [Session].
func (s *restoreSession) Run(ctx context.Context, i int) (Sample, error) {
	w := s.ways[i]
	c, err := startChild(s.command(w), true)
	if err != nil {
		return nil, err
	}
	defer c.stop()
	keys := "s"
	if w.check {
		keys = "sq" // answer; check, answer and end
	}
	if _, err := c.stdin.WriteString(keys); err != nil {
		return nil, c.explain(err)
	}
	end, at, err := c.waitFor(ctx, 0, memwriterAnswer)
	if err != nil {
		return nil, err
	}
	sample := Sample{"answer": milliseconds(at.Sub(c.started))}
	if !w.check {
		return sample, nil
	}
	if _, at, err = c.waitFor(ctx, end, memwriterAnswer); err != nil {
		return nil, err
	}
	sample["touched"] = milliseconds(at.Sub(c.started))
	return sample, nil
}

// Close implements [Session].
func (s *restoreSession) Close() error { return os.RemoveAll(s.dir) }

// saveReport is what ditto says of a save.
type saveReport struct {
	PauseMs *float64 `json:"pause_ms"`
}

// parseSaveReport reads the last of a save's events.
func parseSaveReport(out []byte) (r saveReport, err error) {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &r); err != nil || r.PauseMs == nil {
		return r, fmt.Errorf("report of the save: %w: %s", err, lines[len(lines)-1])
	}
	return r, nil
}
