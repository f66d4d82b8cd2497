package labrun

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"ditto.vm/internal/lab"
	"ditto.vm/internal/labtest"
)

// Runner runs test binaries, several at a time, each worker in a lab of its own.
type Runner struct {
	Out     io.Writer     // what passed and failed, and the output of what failed
	Log     *slog.Logger  // of the labs
	Lab     lab.Options   // of each lab
	Workers int           // how many run at a time; 0 means what this machine carries
	Native  bool          // run on this machine what would run in the lab
	Verbose bool          // print also the output of what passed
	Run     string        // pattern of test names; "" means the list's
	Timeout time.Duration // for each run of a test binary; 0 means DefaultTimeout
	Env     []string      // added to the environment of the tests

	mu      sync.Mutex // guards Out
	workDir string
}

// DefaultTimeout bounds one run of a test binary: three times what the longest
// takes on two busy cores.
const DefaultTimeout = 15 * time.Minute

// target is one run of one test binary.
type target struct {
	name    string // of the job, for people
	pkg     testPackage
	args    []string // without -test.v and the time limit
	where   Where
	timeout time.Duration
	env     []string
}

// maxRepeats is how many failures of one batch may be laid at the emulation's
// door. More of them have a cause in the tree.
const maxRepeats = 3

// Batch runs the lab tests of packages, test by test. It runs them all even if
// some fail.
//
// A host emulated by QEMU's TCG loses a guest, or itself, about once in a
// hundred boots (SVM under TCG is no product). So the few tests that failed in
// one run once more, in a new lab; those that pass then are listed as FLAKY.
// Proofs, and tests on a KVM that runs Linux, have one try.
func (r *Runner) Batch(ctx context.Context, list []LabPackage) error {
	var jobs []job
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
		for _, p := range pkgs {
			more, err := r.batchJobs(ctx, lp, p)
			if err != nil {
				return err
			}
			jobs = append(jobs, more...)
		}
	}
	if len(jobs) == 0 {
		return fmt.Errorf("no test matches %s", r.Run)
	}
	return errors.Join(r.twice(ctx, jobs), context.Cause(ctx))
}

// twice runs jobs, and those that failed once more if they are few and the
// emulation may be to blame.
func (r *Runner) twice(ctx context.Context, jobs []job) error {
	failed, err := r.try(ctx, jobs)
	if r.Native || len(failed) == 0 || len(failed) > maxRepeats || ctx.Err() != nil {
		return err
	}
	r.printf("again, in new labs: %d that failed\n", len(failed))
	lost, err := r.try(ctx, failed)
	for _, j := range failed {
		if !slices.ContainsFunc(lost, func(l job) bool { return l.id == j.id }) {
			r.printf("FLAKY %s: passed the second time\n", j.id)
		}
	}
	return err
}

// try runs jobs once and returns those that failed, and why.
func (r *Runner) try(ctx context.Context, jobs []job) (failed []job, err error) {
	r.pool(ctx, jobs, func(j job, _ *Report, failure error) {
		if failure != nil {
			failed = append(failed, j)
			err = errors.Join(err, failure)
		}
	})
	return failed, err
}

// batchJobs makes a job of each test of a package, or of all of them.
func (r *Runner) batchJobs(ctx context.Context, lp LabPackage, p testPackage) ([]job, error) {
	pattern := cmp.Or(lp.Run, LabRun)
	short := strings.TrimPrefix(p.ImportPath, "ditto.vm/")
	t := target{name: short, pkg: p, args: []string{"-test.run=" + pattern}, where: InLab, timeout: r.Timeout}
	if lp.Boots {
		t.where, t.env = Native, []string{labtest.EnvBoot + "=1"}
	}
	if lp.Whole && r.Run == "" {
		return []job{{id: short, target: t}}, nil
	}
	tests, err := p.tests(ctx, pattern)
	if err != nil {
		return nil, err
	}
	if r.Run != "" {
		wanted, err := p.tests(ctx, r.Run)
		if err != nil {
			return nil, err
		}
		tests = slices.DeleteFunc(tests, func(name string) bool { return !slices.Contains(wanted, name) })
	}
	var jobs []job
	for _, name := range tests {
		t.name, t.args = short+" "+name, []string{"-test.run=^" + name + "$"}
		jobs = append(jobs, job{id: t.name, target: t})
	}
	if len(jobs) == 0 && r.Run == "" {
		return nil, fmt.Errorf("%s: no test matches %s", short, pattern)
	}
	return jobs, nil
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

// Close removes what was built.
func (r *Runner) Close() error {
	if r.workDir == "" {
		return nil
	}
	err := os.RemoveAll(r.workDir)
	r.workDir = ""
	return err
}

func (r *Runner) printf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, _ = fmt.Fprintf(r.Out, format, args...)
}
