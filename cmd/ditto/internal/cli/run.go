package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/terminal"
	"ditto.vm/cmd/ditto/internal/vmproc"
	"ditto.vm/vmm"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/sandbox"
)

func (e *Env) runCommand() *cobra.Command {
	f := &runFlags{}
	cmd := &cobra.Command{
		Use:   "run [flags] [-- COMMAND ARG...]",
		Short: "Start a machine",
		Long: `Start a machine. Without flags it boots the newest cached kernel (or fetches one)
with a u-root userland, 512 MiB of memory, one vCPU and a user-mode network.

On a terminal the machine runs in a process of its own and the terminal is
joined to its console: Ctrl-a d detaches, Ctrl-a x stops the machine, Ctrl-a h
shows the keys. Where standard input is no terminal, the machine runs in this
process: its console is standard input and output, and signals stop it.

After --, a command for ditto's init to run in the guest instead of a shell.
Only its output is shown, its exit status is returned, and the machine powers
off when it ends.

A file says the same as the flags (see --print-config); flags override it, and
a list given by flags replaces the list of the file.

DISK is PATH[,format=F][,readonly][,serial=S][,cache=MODE][,queues=N]; a comma in
the path is written twice. F is raw or qcow2, found by content if it is left out;
with raw a guest may put any image format on its disk. MODE is writeback (the host caches, flushes are kept), none
(the host does not cache) or writethrough (every write is stable at once).

NET is user (NAT, no privileges), tap[,tap=NAME][,bridge=NAME], socket,path=PATH
(a peer such as passt) or none; with ,mac=ADDRESS and ,mtu=BYTES.

FORWARD is [HOSTIP:]HOSTPORT:GUESTPORT[/udp]; without HOSTIP only this host can
connect.`,
		Example: `  ditto run
  ditto run -c 4 -m 2G --disk root.img --append root=/dev/vda
  ditto run -d --name web -p 8080:80 --disk web.img,cache=none
  ditto run --kernel 6.1 -- uname -a
  ditto run --kernel /boot/vmlinuz --initrd /boot/initrd.img --net tap,bridge=br0
  ditto run -f web.yaml --memory 4G`,
		GroupID: groupMachines,
		Args:    commandOnly,
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := f.config(cmd, args)
			if err != nil {
				return err
			}
			if f.printConfig {
				return e.printConfig(cfg)
			}
			return e.run(cmd.Context(), cfg, f)
		},
	}
	f.add(cmd)
	cmd.Flags().SetInterspersed(false)
	_ = cmd.RegisterFlagCompletionFunc("kernel", e.completeKernel)
	return cmd
}

// commandOnly accepts arguments only behind --, lest a mistyped flag value
// becomes a command.
func commandOnly(cmd *cobra.Command, args []string) error {
	if dash := cmd.ArgsLenAtDash(); len(args) > 0 && dash != 0 {
		return exit.Errorf(exit.Usage, "argument %q is unexpected: a command for the guest goes behind --", args[0])
	}
	return nil
}

// config merges the file and the flags, and validates the result.
func (f *runFlags) config(cmd *cobra.Command, args []string) (config.Config, error) {
	cfg := config.Default()
	if f.file != "" {
		var err error
		if cfg, err = config.Load(f.file); err != nil {
			return cfg, exit.New(exit.Usage, err)
		}
	}
	if err := f.apply(cmd.Flags(), &cfg); err != nil {
		return cfg, exit.New(exit.Usage, err)
	}
	if len(args) > 0 {
		cfg.Command = args
	}
	if len(cfg.Command) > 0 && strings.HasPrefix(cfg.Kernel, vmm.PayloadPrefix) {
		return cfg, exit.New(exit.Usage, errors.New("a payload runs no commands: leave out what follows --"))
	}
	return cfg, cfg.Validate()
}

func (e *Env) printConfig(cfg config.Config) error {
	text, err := cfg.YAML()
	if err != nil {
		return err
	}
	_, err = e.Stdout.Write(text)
	return err
}

// run starts the machine.
func (e *Env) run(ctx context.Context, cfg config.Config, f *runFlags) error {
	level, err := parseLevel(f.logLevel)
	if err != nil {
		return err
	}
	commanded := len(cfg.Command) > 0
	if err := e.resolve(ctx, &cfg, isTerminal(e.Stdin) && !f.detach); err != nil {
		return err
	}
	return e.launch(ctx, childJob{Config: cfg, Command: commanded, LogLevel: level}, f.detach)
}

// launch runs a machine in the background, in a process of its own that this
// terminal is joined to, or here.
func (e *Env) launch(ctx context.Context, job childJob, detach bool) error {
	switch {
	case detach:
		child, err := e.startChild(ctx, job)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(e.Stdout, child.name)
		return err
	case isTerminal(e.Stdin):
		return e.runAttached(ctx, job)
	}
	return e.runHere(ctx, job)
}

func parseLevel(s string) (slog.Level, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(s)); err != nil {
		return 0, exit.Errorf(exit.Usage, "--log-level %q is unknown: use debug, info, warn or error", s)
	}
	return level, nil
}

// runAttached runs a machine in a process of its own with this terminal on its
// console, and ends as the machine does unless the user detaches.
func (e *Env) runAttached(ctx context.Context, job childJob) error {
	child, err := e.startChild(ctx, job)
	if err != nil {
		return err
	}
	r, err := e.Registry()
	if err != nil {
		return err
	}
	out, filter := e.output(job.Command)
	shown := &counter{out: out}
	if vm, err := r.Find(child.name); err == nil {
		result, err := e.attach(ctx, vm, shown)
		switch {
		case err != nil && shown.n > 0:
			return err
		case err == nil && result == terminal.Detached:
			e.notice("detached; ditto console %s brings it back", child.name)
			return nil
		}
	}
	if shown.n == 0 {
		// It ended before the terminal was joined; the log has all it said.
		if err := copyFile(out, r.LogPath(child.name)); err != nil {
			return err
		}
	}
	// The process has flushed its disks and written how it ended.
	child.wait()
	if last, err := r.LastExit(child.name); err == nil && last.Error == "" && last.Reason == "killed" {
		e.notice("%s was killed", child.name)
	}
	return e.explain(lastCode(r, child.name), filter)
}

// counter counts what is written to out.
type counter struct {
	out io.Writer
	n   int
}

// Write writes p to out.
func (c *counter) Write(p []byte) (int, error) {
	n, err := c.out.Write(p)
	c.n += n
	return n, err
}

func copyFile(out io.Writer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	defer f.Close()
	if _, err := io.Copy(out, f); err != nil {
		return fmt.Errorf("log: %w", err)
	}
	return nil
}

// output returns where the console goes: to standard output, through a filter
// if a command runs.
func (e *Env) output(command bool) (out io.Writer, filter *terminal.CommandOutput) {
	if !command {
		return e.Stdout, nil
	}
	filter = terminal.NewCommandOutput(e.Stdout, !isTerminal(e.Stdout))
	return filter, filter
}

// explain adds what the guest printed last when its command never started.
func (e *Env) explain(err error, filter *terminal.CommandOutput) error {
	var status *statusError
	if err == nil || filter == nil || errors.As(err, &status) {
		return err
	}
	if before := tail(filter.Before(), 10); before != "" {
		fmt.Fprintf(e.Stderr, "%s\n", before)
	}
	return err
}

// runHere runs a machine in this process.
func (e *Env) runHere(ctx context.Context, job childJob) error {
	r, err := e.Registry()
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer signal.Stop(signals)
	out, filter := e.output(job.Command)
	code, err := vmproc.Run(context.WithoutCancel(ctx), vmproc.Options{
		Config: job.Config, Command: job.Command, Registry: r, Build: e.builder(job), Version: e.Version.String(),
		Log: func(string) (*slog.Logger, error) {
			return slog.New(slog.NewTextHandler(e.Stderr, &slog.HandlerOptions{Level: job.LogLevel})), nil
		},
		Output: out, Input: e.Stdin, Signals: signals, Sandbox: sandbox.Apply,
	})
	if err == nil && code != exit.OK {
		err = &statusError{code}
	}
	return e.explain(err, filter)
}
