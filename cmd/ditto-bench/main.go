// Command ditto-bench measures ditto beside QEMU and writes what it found as
// JSON and into the tables of docs/benchmarks.md (see internal/bench).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/bench"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1 // a benchmark failed or could not run
	exitUsage  = 2
)

// insideArg makes the program read a job from its standard input.
const insideArg = "--inside-lab"

// options are the command's flags.
type options struct {
	match, ditto, json, docs, rootDisk string
	quick, list, native                bool
	rounds                             int
	limit                              time.Duration
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if len(os.Args) == 2 && os.Args[1] == insideArg {
		if err := bench.RunJob(ctx, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(exitFailed)
		}
		return
	}
	code, err := run(ctx, os.Args[1:], os.Stderr)
	if err != nil {
		fmt.Fprintf(os.Stderr, "ditto-bench: %v\n", err)
	}
	os.Exit(code)
}

// parse reads the flags.
func parse(args []string, out io.Writer) (options, error) {
	var o options
	flags := flag.NewFlagSet("ditto-bench", flag.ContinueOnError)
	flags.SetOutput(out)
	flags.StringVar(&o.match, "run", "", "run the benchmarks whose name matches this regular `expression`")
	flags.BoolVar(&o.list, "list", false, "list the benchmarks and end")
	flags.BoolVar(&o.quick, "quick", false, "fewer rounds, for a first look")
	flags.IntVar(&o.rounds, "rounds", 0, "at most so many `rounds` of each benchmark; 0 for what it says itself")
	flags.BoolVar(&o.native, "here", false, "run everything on this machine, without an emulated host")
	flags.StringVar(&o.ditto, "ditto", "", "the `program` to measure (default: ditto beside this program)")
	flags.StringVar(&o.rootDisk, "root-disk", "", "a raw ext4 `image` of Debian with fio, iperf3 and iproute2 (default: built and cached)")
	flags.StringVar(&o.json, "json", "", "the report's `file`; results of other benchmarks in it are kept (default \""+defaultJSON+"\", with --quick \""+quickJSON+"\")")
	flags.StringVar(&o.docs, "docs", "", "the `document` whose tables are rewritten; none for nothing (default \""+defaultDocs+"\", with --quick none)")
	flags.DurationVar(&o.limit, "limit", 45*time.Minute, "give up after this time")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("what is %q? choose benchmarks with --run", flags.Arg(0))
	}
	o.defaults()
	return o, nil
}

// Where the results go.
const (
	defaultJSON = "out/bench.json"
	quickJSON   = "out/bench-quick.json"
	defaultDocs = "docs/benchmarks.md"
	noDocs      = "none"
)

// defaults fills in where the results go: a quick look replaces no figures.
func (o *options) defaults() {
	if o.json == "" {
		o.json = defaultJSON
		if o.quick {
			o.json = quickJSON
		}
	}
	if o.docs == "" && !o.quick {
		o.docs = defaultDocs
	}
	if o.docs == noDocs {
		o.docs = ""
	}
}

func run(ctx context.Context, args []string, out io.Writer) (int, error) {
	o, err := parse(args, out)
	if errors.Is(err, flag.ErrHelp) {
		return exitOK, nil
	}
	if err != nil {
		return exitUsage, err
	}
	chosen, err := bench.Select(bench.All(), o.match)
	if err != nil {
		return exitUsage, err
	}
	if o.list {
		for _, b := range chosen {
			fmt.Fprintf(out, "%-16s %-7s %s\n", b.Name, b.Where, b.Title)
		}
		return exitOK, nil
	}
	report, err := bench.LoadReport(o.json)
	if err != nil {
		return exitFailed, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, o.limit, fmt.Errorf("not done within --limit %s", o.limit))
	defer cancel()
	s := &suite{options: o, out: out, start: time.Now(), report: &report}
	err = s.run(ctx, chosen)
	switch {
	case err != nil:
		return exitFailed, err
	case s.bad > 0:
		return exitFailed, fmt.Errorf("%d of %d benchmarks have no result", s.bad, len(chosen))
	}
	return exitOK, nil
}

// suite is one run of the command.
type suite struct {
	options
	out    io.Writer
	start  time.Time
	report *bench.Report
	bad    int
}

// say prints a line of progress with the time since the start.
func (s *suite) say(format string, args ...any) {
	fmt.Fprintf(s.out, "%6.1fs  %s\n", time.Since(s.start).Seconds(), fmt.Sprintf(format, args...))
}

// run runs the benchmarks, the native ones first, and writes the report after
// each.
func (s *suite) run(ctx context.Context, chosen []bench.Benchmark) (err error) {
	program, err := os.Executable()
	if err != nil {
		return err
	}
	if s.ditto == "" {
		s.ditto = filepath.Join(filepath.Dir(program), "ditto")
	}
	if s.ditto, err = filepath.Abs(s.ditto); err != nil {
		return err
	}
	scratch, err := os.MkdirTemp("", "ditto-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()

	env := bench.Env{Ditto: s.ditto, RootDisk: s.rootDisk, Scratch: scratch, Quick: s.quick, Rounds: s.rounds, Commit: commit(ctx)}
	env.Prepare(ctx, chosen, s.say)
	env.Host = bench.DescribeHost(ctx, env.QEMU)
	s.say("host: %s", env.Host)

	here := s.native
	if !here {
		var why string
		if here, why = bench.LinuxRunsHere(); !here {
			s.say("Linux guests need an emulated host: %s", why)
		}
	}
	away := map[int][]string{} // by CPUs of the emulated host
	for _, b := range chosen {
		if b.Where == bench.Lab && !here {
			away[b.LabCPUs] = append(away[b.LabCPUs], b.Name)
			continue
		}
		if err := s.done(bench.Run(ctx, &b, &env, s.say)); err != nil {
			return err
		}
	}
	var broken error
	for _, cpus := range slices.Sorted(maps.Keys(away)) {
		err := bench.RunInLab(ctx, cpus, program, []string{insideArg}, bench.Job{Names: away[cpus], Env: env}, s.say, func(r bench.Result) {
			broken = errors.Join(broken, s.done(r))
		})
		broken = errors.Join(broken, err)
	}
	return errors.Join(broken, ctx.Err())
}

// done keeps a result and prints what came of it.
func (s *suite) done(r bench.Result) error {
	if r.Skipped != "" || r.Failed != "" {
		s.bad++
		s.say("%s: %s%s", r.Name, r.Skipped, r.Failed)
	}
	for _, line := range r.Verdicts() {
		s.say("%s", line)
	}
	s.report.Put(r)
	if err := s.report.Save(s.json); err != nil {
		return err
	}
	if s.docs == "" {
		return nil
	}
	return bench.UpdateDocument(s.docs, *s.report)
}

// commit names the source that is measured, with a mark if it was changed.
func commit(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "git", "describe", "--always", "--dirty", "--abbrev=10").Output()
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(out))
}
