package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ditto.vm/internal/lab"
)

// Exit statuses that are not the command's, as timeout(1) and docker-run(1)
// have them.
const (
	exitTimeout = 124
	exitFailed  = 125
)

// defaultTimeout keeps a forgotten lab from running for ever.
const defaultTimeout = 4 * time.Hour

// errTimeLimit is the cause of a context that the time limit ended.
var errTimeLimit = errors.New("time limit reached")

// flags are the command line.
type flags struct {
	opts    lab.Options
	disk    string
	disks   []string
	timeout time.Duration
	verbose bool
}

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

func run(args []string, stdin *os.File, stdout, stderr io.Writer) int {
	code := 0
	cmd := newCommand(func(f *flags, argv []string) error {
		var err error
		code, err = f.run(argv, stdin, stdout, stderr)
		return err
	})
	cmd.AddCommand(newTestCommand(stdout, stderr), newProveCommand(stdout, stderr), newPrepareCommand(stderr))
	cmd.CompletionOptions.DisableDefaultCmd = true
	cmd.SetArgs(args)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	err := cmd.Execute()
	if err == nil {
		return code
	}
	fmt.Fprintln(stderr, "ditto-lab:", err)
	var sig signalError
	switch {
	case errors.Is(err, errTimeLimit):
		return exitTimeout
	case errors.As(err, &sig):
		return 128 + int(sig.Signal)
	}
	return exitFailed
}

func newCommand(run func(*flags, []string) error) *cobra.Command {
	f := &flags{}
	cmd := &cobra.Command{
		Use:   "ditto-lab [flags] -- COMMAND [ARG...]",
		Short: "Run a command in an emulated host that has AMD-V and nested paging",
		Long: `Run a command in an emulated host that has AMD-V and nested paging.

This machine's files are there under their own paths; what the command writes is
thrown away, except below /lab-share. /lab is an ext4 file system on a scratch
disk. Without a command a shell is run.`,
		Args:          cobra.ArbitraryArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(_ *cobra.Command, argv []string) error {
			if len(argv) == 0 {
				argv = []string{"sh"}
			}
			return run(f, argv)
		},
	}
	fs := cmd.Flags()
	fs.SetInterspersed(false)
	fs.IntVarP(&f.opts.MemoryMiB, "memory", "m", lab.DefaultMemoryMiB, "memory of the emulated host in MiB")
	fs.IntVarP(&f.opts.CPUs, "cpus", "c", lab.DefaultCPUs, "its CPUs (QEMU's TCG is steady with one only)")
	fs.DurationVarP(&f.timeout, "timeout", "t", defaultTimeout, "time limit, boot included (0: none)")
	fs.StringVar(&f.disk, "disk", "64G", "size of the sparse scratch disk mounted on /lab")
	fs.StringArrayVar(&f.disks, "keep-disk", nil, "raw image to attach as /dev/lab/disk0, ... (may be repeated)")
	fs.StringVarP(&f.opts.Kernel, "kernel", "k", lab.DefaultKernel, "generic kernel to boot: a version or a path")
	fs.StringVar(&f.opts.THP, "thp", lab.DefaultTHP, "transparent huge pages: always, madvise or never")
	fs.StringVar(&f.opts.Append, "append", "", "text to add to the kernel's command line")
	fs.StringArrayVar(&f.opts.QEMUArgs, "qemu-arg", nil, "argument to add to QEMU's command line (may be repeated)")
	fs.BoolVarP(&f.verbose, "verbose", "v", false, "say what is being done")
	return cmd
}

// signalError is the cause of a context that a signal ended.
type signalError struct{ unix.Signal }

func (e signalError) Error() string { return "stopped by " + e.String() }

func (f *flags) run(argv []string, stdin *os.File, stdout, stderr io.Writer) (code int, err error) {
	if f.opts.DiskBytes, err = parseSize(f.disk); err != nil {
		return 0, fmt.Errorf("--disk: %w", err)
	}
	level := slog.LevelWarn
	if f.verbose {
		level = slog.LevelInfo
	}
	f.opts.Progress = &textProgress{w: stderr}
	f.opts.Disks = f.disks
	f.opts.Log = slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))

	ctx, cancel := signalContext(context.Background())
	defer cancel()
	if f.timeout > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, f.timeout, errTimeLimit)
		defer stop()
	}
	l, err := lab.Start(ctx, f.opts)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return 0, err
	}
	defer func() {
		if cerr := l.Close(); err == nil && cerr != nil {
			err = cerr
		}
	}()
	cmd := &lab.Cmd{Args: argv, Stdin: stdin, Stdout: stdout, Stderr: stderr}
	restore, err := attachTerminal(cmd, stdin, stdout)
	if err != nil {
		return 0, err
	}
	defer restore()
	code, err = l.Run(ctx, cmd)
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return code, err
}

// signalContext returns a context that SIGINT, SIGTERM or SIGHUP ends.
func signalContext(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(parent)
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	go func() {
		select {
		case s := <-ch:
			if sig, ok := s.(unix.Signal); ok {
				cancel(signalError{sig})
			}
		case <-ctx.Done():
		}
		signal.Stop(ch) // a second one ends this process, and QEMU with it
	}()
	return ctx, func() { cancel(context.Canceled) }
}

// textProgress names each step once, when it begins: only what takes long is
// reported, and mostly once in the life of a cache.
type textProgress struct {
	w    io.Writer
	last string
}

func (p *textProgress) Report(what string, fraction float64) {
	if what == p.last || fraction == 1 {
		return
	}
	p.last = what
	_, _ = fmt.Fprintf(p.w, "ditto-lab: %s\n", what)
}
