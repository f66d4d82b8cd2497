package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"ditto.vm/internal/labrun"
)

// testFlags are the flags of the subcommands that run tests.
type testFlags struct {
	native bool
	lab    bool
	run    string
	again  bool
	limit  time.Duration
	// how many labs, and whether to print all output
	labs    int
	verbose bool
}

// newTestCommand runs tests that need Linux guests.
func newTestCommand(stdout, stderr io.Writer) *cobra.Command {
	f := &testFlags{}
	cmd := &cobra.Command{
		Use:   "test [flags] [PACKAGE...]",
		Short: "Run the tests that need Linux guests in emulated hosts",
		Long: `Compile the test binaries of the packages (by default all that are listed in
internal/labrun) and run their TestLab... and TestLinux... tests in emulated
hosts, several at a time, or on this machine if its own KVM runs Linux. Nothing
may be skipped there. It must be run inside the source tree.`,
		RunE: func(_ *cobra.Command, pkgs []string) error {
			list := labrun.LabPackages()
			if len(pkgs) > 0 {
				list = labrun.Select(pkgs)
			}
			return f.with(stdout, stderr, func(ctx context.Context, r *labrun.Runner) error {
				return r.Batch(ctx, list)
			})
		},
	}
	f.register(cmd)
	cmd.Flags().StringVar(&f.run, "run", "", "pattern of test names (default "+labrun.LabRun+")")
	return cmd
}

// newProveCommand runs the long proofs.
func newProveCommand(stdout, stderr io.Writer) *cobra.Command {
	f := &testFlags{}
	cmd := &cobra.Command{
		Use:   "prove [flags] [ID...]",
		Short: "Run the proofs of docs/proofs.md with full counts",
		Long: `Run the proofs (all, or those with the given ids) and every fuzz target, and
write measured figures into docs/proofs.md. What has passed for the same sources
is not run again. It must be run at the root of the source tree.`,
		RunE: func(_ *cobra.Command, ids []string) error {
			return f.with(stdout, stderr, func(ctx context.Context, r *labrun.Runner) error {
				return r.Prove(ctx, ids, f.again)
			})
		},
	}
	f.register(cmd)
	cmd.Flags().BoolVar(&f.again, "again", false, "run also what has passed")
	return cmd
}

func (f *testFlags) register(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.native, "native", false, "use this machine's KVM even if it does not seem to run Linux")
	cmd.Flags().BoolVar(&f.lab, "lab", false, "use an emulated host even if this machine's KVM runs Linux")
	cmd.MarkFlagsMutuallyExclusive("native", "lab")
	cmd.Flags().IntVarP(&f.labs, "jobs", "j", 0, "emulated hosts to use at a time (0: as many as this machine carries)")
	cmd.Flags().BoolVarP(&f.verbose, "verbose", "v", false, "print also the output of what passed")
	cmd.Flags().DurationVarP(&f.limit, "timeout", "t", labrun.DefaultTimeout, "time limit of each test binary")
}

// with calls fn with a runner that signals end.
func (f *testFlags) with(stdout, stderr io.Writer, fn func(context.Context, *labrun.Runner) error) (err error) {
	ctx, cancel := signalContext(context.Background())
	defer cancel()
	native := f.native
	if !f.native && !f.lab {
		ok, reason := labrun.LinuxRuns()
		native = ok
		if !ok {
			_, _ = fmt.Fprintf(stdout, "using an emulated host: %s\n", reason)
		}
	}
	r := &labrun.Runner{
		Out:     stdout,
		Log:     slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelInfo})),
		Native:  native,
		Workers: f.labs,
		Verbose: f.verbose,
		Run:     f.run,
		Timeout: f.limit,
	}
	r.Lab.Progress = &textProgress{w: stderr}
	defer func() {
		if cerr := r.Close(); err == nil && cerr != nil {
			err = cerr
		}
	}()
	if err := fn(ctx, r); err != nil {
		return err
	}
	_, _ = fmt.Fprintln(stdout, "all passed")
	return nil
}
