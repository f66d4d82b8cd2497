package labrun

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"ditto.vm/internal/lab"
	"ditto.vm/internal/labtest"
)

// Runner runs test binaries.
type Runner struct {
	Out     io.Writer    // output of tests and progress
	Log     *slog.Logger // of the lab
	Lab     lab.Options
	Native  bool          // run on this machine what would run in the lab
	Run     string        // pattern of test names; "" means the list's
	Timeout time.Duration // for each test binary; 0 means DefaultTimeout
	Env     []string      // added to the environment of the tests

	started *lab.Lab
	workDir string
}

// DefaultTimeout bounds one test binary.
const DefaultTimeout = 30 * time.Minute

// target is one run of one test binary.
type target struct {
	pkg     testPackage
	args    []string // without -test.v and the time limit
	where   Where
	timeout time.Duration
	env     []string
	mayskip bool
}

// Batch runs the lab tests of packages, all in one lab. It runs them all even
// if some fail.
func (r *Runner) Batch(ctx context.Context, list []LabPackage) error {
	var targets []target
	for _, lp := range list {
		if lp.Boots && r.Native {
			continue
		}
		pkgs, err := listPackages(ctx, lp.Path)
		if err != nil {
			return err
		}
		if len(pkgs) == 0 {
			return fmt.Errorf("%s: no package with tests matches", lp.Path)
		}
		if err := r.open(ctx, pkgs); err != nil {
			return err
		}
		run := cmp.Or(r.Run, lp.Run, LabRun)
		for _, p := range pkgs {
			t := target{pkg: p, args: []string{"-test.run=" + run}, where: InLab, timeout: r.Timeout}
			if lp.Boots {
				t.where, t.env = Native, []string{labtest.EnvBoot + "=1"}
			}
			targets = append(targets, t)
		}
	}
	var failed error
	for _, t := range targets {
		report, err := r.one(ctx, t)
		if err != nil {
			r.printf("=== %v\n", err)
			err = r.again(ctx, t, report, err)
		}
		if err != nil {
			failed = errors.Join(failed, err)
		}
		if ctx.Err() != nil {
			return errors.Join(failed, context.Cause(ctx))
		}
	}
	return failed
}

// again runs what has failed in the emulated host once more, in a new one: guests
// inside an emulated host now and then die of a triple fault. What then passes
// is called flaky in the output and does not fail the batch. On hardware, and
// in proofs, nothing is run again.
func (r *Runner) again(ctx context.Context, t target, first *Report, failure error) error {
	if r.Native || ctx.Err() != nil {
		return failure
	}
	if r.started != nil {
		_ = r.started.Close()
		r.started = nil
	}
	if len(first.Failures) > 0 {
		t.args = []string{"-test.run=^(" + strings.Join(first.Failures, "|") + ")$"}
	}
	r.printf("=== %s: once more in a new emulated host\n", t.pkg.ImportPath)
	if _, err := r.one(ctx, t); err != nil {
		return errors.Join(failure, fmt.Errorf("once more: %w", err))
	}
	r.printf("=== %s: FLAKY, passed when run again: %s\n", t.pkg.ImportPath, strings.Join(first.Failures, ", "))
	return nil
}

// open compiles the test binaries and the commands.
func (r *Runner) open(ctx context.Context, pkgs []testPackage) error {
	if r.workDir == "" {
		dir, err := os.MkdirTemp("", "ditto-labrun-")
		if err != nil {
			return err
		}
		r.workDir = dir
		r.printf("compiling the commands and the test binaries\n")
		if err := buildCommands(ctx, r.binDir()); err != nil {
			return err
		}
	}
	for i := range pkgs {
		if err := pkgs[i].compile(ctx, r.workDir); err != nil {
			return err
		}
	}
	return nil
}

func (r *Runner) binDir() string { return filepath.Join(r.workDir, "bin") }

// Close ends the lab, if one was started, and removes what was built.
func (r *Runner) Close() error {
	var err error
	if r.started != nil {
		err = r.started.Close()
		r.started = nil
	}
	if r.workDir != "" {
		err = errors.Join(err, os.RemoveAll(r.workDir))
		r.workDir = ""
	}
	return err
}

// one runs one target and checks what it says.
func (r *Runner) one(ctx context.Context, t target) (*Report, error) {
	if t.timeout == 0 {
		t.timeout = DefaultTimeout
	}
	args := append([]string{t.pkg.binary, "-test.v", "-test.timeout=" + t.timeout.String()}, t.args...)
	env := append(os.Environ(), labtest.EnvRequireKVM+"=1", labtest.EnvBin+"="+r.binDir())
	env = append(append(env, r.Env...), t.env...)
	report := &Report{}
	out := &scanner{dst: r.Out, report: report}
	r.printf("=== %s on %s\n", t.pkg.ImportPath, r.place(t))
	begin := time.Now()
	code, err := r.execute(ctx, t, args, env, out)
	if err != nil {
		return report, fmt.Errorf("%s: %w", t.pkg.ImportPath, err)
	}
	r.printf("=== %s: %d passed, %d failed, %d skipped in %s\n", t.pkg.ImportPath,
		report.Passed, report.Failed, report.Skipped, time.Since(begin).Round(time.Second/10))
	return report, report.check(t.pkg.ImportPath, code, t.mayskip)
}

func (r *Runner) place(t target) string {
	if t.where == InLab && !r.Native {
		return "the emulated host"
	}
	return "this machine"
}

// execute runs a test binary where it belongs.
func (r *Runner) execute(ctx context.Context, t target, args, env []string, out io.Writer) (int, error) {
	// The binary ends itself at its time limit, with a stack trace; this is for
	// one that does not.
	ctx, cancel := context.WithTimeout(ctx, t.timeout+time.Minute)
	defer cancel()
	if t.where == InLab && !r.Native {
		l, err := r.lab(ctx)
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

// lab returns the running lab, and starts one if there is none or the last one
// has died.
func (r *Runner) lab(ctx context.Context) (*lab.Lab, error) {
	if r.started != nil {
		select {
		case <-r.started.Done():
			_ = r.started.Close()
			r.started = nil
		default:
			return r.started, nil
		}
	}
	r.printf("booting the emulated host\n")
	opts := r.Lab
	opts.Log = r.Log
	l, err := lab.Start(ctx, opts)
	if err != nil {
		return nil, err
	}
	r.started = l
	return l, nil
}

func (r *Runner) printf(format string, args ...any) {
	_, _ = fmt.Fprintf(r.Out, format, args...)
}
