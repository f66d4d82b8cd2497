package labrun

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/lab"
	"ditto.vm/internal/labtest"
)

// labMemory is what one lab may take from this machine, in bytes.
const labMemory = (lab.DefaultMemoryMiB + 1024) << 20

// workers returns how many labs this machine carries.
func (r *Runner) workers() int {
	switch {
	case r.Workers > 0:
		return r.Workers
	case r.Native:
		return 1
	}
	n := runtime.NumCPU()
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		n = min(n, int(info.Totalram*uint64(info.Unit)/labMemory))
	}
	return max(n, 1)
}

// pool runs the jobs, beginning with the first, and calls done after each, one
// at a time. It ends early when ctx does.
func (r *Runner) pool(ctx context.Context, jobs []job, done func(job, *Report, error)) {
	queue := make(chan job)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range min(r.workers(), len(jobs)) {
		wg.Go(func() {
			w := &worker{Runner: r}
			defer w.close()
			for j := range queue {
				report, err := w.one(ctx, j)
				mu.Lock()
				done(j, report, err)
				mu.Unlock()
			}
		})
	}
	for _, j := range jobs {
		if ctx.Err() != nil {
			break
		}
		select {
		case queue <- j:
		case <-ctx.Done():
		}
	}
	close(queue)
	wg.Wait()
}

// worker runs one job after another, in a lab of its own.
type worker struct {
	*Runner
	started *lab.Lab
}

// one runs one job and checks what it says.
func (w *worker) one(ctx context.Context, j job) (*Report, error) {
	if j.target.where == Native {
		w.close() // it may boot labs itself
	}
	w.printf("run   %s on %s\n", j.id, w.place(j.target))
	report, out := &Report{}, &bytes.Buffer{}
	begin := time.Now()
	var err error
	if j.fuzz {
		err = w.fuzz(ctx, j, out, report)
	} else {
		err = w.test(ctx, j.target, &scanner{dst: out, report: report}, report)
	}
	took := time.Since(begin).Round(time.Second / 10)
	switch {
	case err != nil:
		w.close() // whatever happened to it, the next job shall not inherit it
		w.printf("%s\nFAIL  %s after %s: %v\n", bytes.TrimRight(out.Bytes(), "\n"), j.id, took, err)
		return report, fmt.Errorf("%s: %w", j.id, err)
	case w.Verbose:
		w.printf("%s\n", bytes.TrimRight(out.Bytes(), "\n"))
	}
	w.printf("ok    %s in %s%s\n", j.id, took, figures(report))
	return report, nil
}

// figures lists what a report measured, a line for each.
func figures(r *Report) string {
	var b strings.Builder
	if r != nil {
		for _, f := range r.Figures {
			fmt.Fprintf(&b, "\n        %s: %s", f.ID, f.Text)
		}
	}
	return b.String()
}

// test runs a test binary and checks its report.
func (w *worker) test(ctx context.Context, t target, out io.Writer, report *Report) error {
	if t.timeout == 0 {
		t.timeout = DefaultTimeout
	}
	args := append([]string{t.pkg.binary, "-test.v", "-test.timeout=" + t.timeout.String()}, t.args...)
	env := append(os.Environ(), labtest.EnvRequireKVM+"=1", labtest.EnvBin+"="+w.binDir())
	env = append(append(env, w.Env...), t.env...)
	code, err := w.execute(ctx, t, args, env, out)
	if err != nil {
		return err
	}
	return report.check(code)
}

// fuzz runs a fuzz target with the go command, whose coverage instrumentation
// and cache a bare test binary lacks. Each worker fuzzes with one core.
func (w *worker) fuzz(ctx context.Context, j job, out *bytes.Buffer, report *Report) error {
	args := []string{"test", j.target.pkg.ImportPath, "-parallel=1"}
	for _, a := range j.target.args {
		args = append(args, "-"+strings.TrimPrefix(a, "-test."))
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		return err
	}
	runs := fuzzRuns(out.String())
	if runs == "" {
		return errors.New("the output does not say how often the target was run")
	}
	report.Figures = append(report.Figures, Figure{j.id, fmt.Sprintf("%s, %s runs, nothing found", FuzzTime, runs)})
	return nil
}

var fuzzLine = regexp.MustCompile(`(?m)^fuzz: elapsed: .*, execs: ([0-9]+) `)

// fuzzRuns returns the last count of runs in the output of go test -fuzz.
func fuzzRuns(out string) string {
	all := fuzzLine.FindAllStringSubmatch(out, -1)
	if len(all) == 0 {
		return ""
	}
	return all[len(all)-1][1]
}

func (w *worker) place(t target) string {
	if t.where == InLab && !w.Native {
		return "an emulated host"
	}
	return "this machine"
}

// execute runs a test binary where it belongs.
func (w *worker) execute(ctx context.Context, t target, args, env []string, out io.Writer) (int, error) {
	// The binary ends itself at its time limit, with a stack trace; this is for
	// one that does not.
	ctx, cancel := context.WithTimeout(ctx, t.timeout+time.Minute)
	defer cancel()
	if t.where == InLab && !w.Native {
		l, err := w.lab(ctx)
		if err != nil {
			return -1, err
		}
		env = append(env, "TMPDIR="+lab.ScratchDir)
		return l.Run(ctx, &lab.Cmd{Args: args, Env: env, Dir: t.pkg.Dir, Stdout: out, Stderr: out})
	}
	if t.where == InLab {
		env = append(env, labtest.EnvLinuxKVM+"=1")
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = env, t.pkg.Dir, out, out
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// lab returns the worker's lab, and starts one if there is none or the last one
// has died.
func (w *worker) lab(ctx context.Context) (*lab.Lab, error) {
	if w.started != nil {
		select {
		case <-w.started.Done():
			w.close()
		default:
			return w.started, nil
		}
	}
	opts := w.Lab
	opts.Log = w.Log
	l, err := lab.Start(ctx, opts)
	if err != nil {
		return nil, err
	}
	w.started = l
	return l, nil
}

// close ends the worker's lab, if one was started.
func (w *worker) close() {
	if w.started != nil {
		_ = w.started.Close()
		w.started = nil
	}
}
