package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"

	"ditto.vm/internal/lab"
)

// Job is what a process in the lab is told to do.
type Job struct {
	Names []string `json:"names"`
	Env   Env      `json:"env"`
}

// Event is one line that the process in the lab says: either field is set.
type Event struct {
	Progress string  `json:"progress,omitempty"`
	Result   *Result `json:"result,omitempty"`
}

// rootDiskInLab is where [RunInLab] attaches Env.RootDisk.
const rootDiskInLab = lab.DiskDir + "/disk0"

// RunInLab boots an emulated host with so many CPUs (see [Benchmark.LabCPUs]) and
// runs the named benchmarks in it. program is this very program; it is run with
// the arguments args and gets the [Job] on its standard input.
func RunInLab(ctx context.Context, cpus int, program string, args []string, job Job, progress Progress, done func(Result)) (err error) {
	if cpus == 0 {
		cpus = runtime.NumCPU()
	}
	options := lab.Options{CPUs: cpus}
	if job.Env.RootDisk != "" {
		options.Disks = []string{job.Env.RootDisk}
		job.Env.RootDisk = rootDiskInLab
	}
	job.Env.Scratch = lab.ScratchDir
	outer := job.Env.Host
	job.Env.Host = Host{EmulatedOn: &outer}
	text, err := json.Marshal(job)
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	progress("lab: booting")
	host, err := lab.Start(ctx, options)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, host.Close()) }()

	events, eventsWriter := io.Pipe()
	served := make(chan error, 1)
	go func() { served <- readEvents(events, progress, done) }()
	var errs tail
	code, err := host.Run(ctx, &lab.Cmd{
		Args: append([]string{program}, args...), Stdin: bytes.NewReader(text), Stdout: eventsWriter, Stderr: &errs,
	})
	_ = eventsWriter.Close()
	if err := errors.Join(err, <-served); err != nil {
		return err
	}
	if code != 0 {
		return fmt.Errorf("in the lab: exit status %d: %s", code, oneLine(errs.String()))
	}
	return nil
}

// readEvents hands on what the process in the lab says, and reads to the end
// whatever comes, so that the writer is never stuck.
func readEvents(r io.Reader, progress Progress, done func(Result)) error {
	lines := bufio.NewReader(r)
	var all error
	for {
		line, err := lines.ReadBytes('\n')
		if len(bytes.TrimSpace(line)) > 0 {
			var e Event
			if err := json.Unmarshal(line, &e); err != nil {
				all = errors.Join(all, fmt.Errorf("from the lab: %w: %q", err, line))
			}
			if e.Progress != "" {
				progress("lab: %s", e.Progress)
			}
			if e.Result != nil {
				done(*e.Result)
			}
		}
		if err == io.EOF {
			return all
		}
		if err != nil {
			return errors.Join(all, err)
		}
	}
}

// RunJob is the other side: it runs the job that stands on in and writes an
// [Event] a line to out.
func RunJob(ctx context.Context, in io.Reader, out io.Writer) error {
	var job Job
	if err := json.NewDecoder(in).Decode(&job); err != nil {
		return fmt.Errorf("job: %w", err)
	}
	outer := job.Env.Host.EmulatedOn
	job.Env.Host = DescribeHost(ctx, job.Env.QEMU)
	job.Env.Host.EmulatedOn = outer
	if err := job.Env.bringClose(); err != nil {
		return fmt.Errorf("job: %w", err)
	}
	if outer != nil && runtime.NumCPU() == 1 {
		if err := shareCPU(); err != nil {
			return fmt.Errorf("job: %w", err)
		}
	}
	events := json.NewEncoder(out)
	var broken error
	say := func(e Event) {
		if err := events.Encode(e); err != nil && broken == nil {
			broken = err
		}
	}
	progress := func(format string, args ...any) { say(Event{Progress: fmt.Sprintf(format, args...)}) }
	for _, b := range All() {
		if !slices.Contains(job.Names, b.Name) {
			continue
		}
		result := Run(ctx, &b, &job.Env, progress)
		say(Event{Result: &result})
		if broken != nil || ctx.Err() != nil {
			break
		}
	}
	return errors.Join(broken, ctx.Err())
}

// schedFeatures and schedSlice are where Linux has its scheduler tuned (debugfs).
const (
	schedFeatures = "/sys/kernel/debug/sched/features"
	schedSlice    = "/sys/kernel/debug/sched/base_slice_ns"
)

// shareCPU lets the emulated host's only CPU change hands as soon as a thread is
// woken. A VMM's threads have cores of their own elsewhere; here a worker would
// wait for the rest of the vCPU's time slice, now and then for milliseconds, and
// that lottery would hide what is compared. It is the same for all contestants.
func shareCPU() error {
	if err := os.WriteFile(schedFeatures, []byte("NO_RUN_TO_PARITY"), 0o600); err != nil {
		return err
	}
	return os.WriteFile(schedSlice, []byte("100000"), 0o600)
}
