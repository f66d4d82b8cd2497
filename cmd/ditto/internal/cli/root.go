package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/vmproc"
	"ditto.vm/vmm/registry"
)

// Env is what the commands work with; tests put in their own.
type Env struct {
	Stdin          *os.File
	Stdout, Stderr io.Writer
	// Registry opens the user's registry.
	Registry func() (*registry.Registry, error)
	// Build makes machines, Restore those of snapshots, Arrive those that other
	// hosts send.
	Build   vmproc.Builder
	Restore func(vmproc.Restore) vmproc.Builder
	Arrive  vmproc.Arriver
	// Version is what version prints.
	Version Version
}

// Main runs the command line args (without the program's name) and returns the
// exit code. version may be empty.
func Main(version string, args []string) int {
	env := &Env{
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Registry: registry.Open, Build: vmproc.BuildVM, Restore: vmproc.Restore.Builder, Arrive: vmproc.ArriveVM,
		Version: buildVersion(version),
	}
	if len(args) == 1 {
		switch args[0] {
		case vmProcessArg:
			return env.childMain()
		case receiverArg:
			return env.receiverMain()
		}
	}
	return env.Execute(context.Background(), args)
}

// Execute runs a command line and reports its error.
func (e *Env) Execute(ctx context.Context, args []string) int {
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
	defer stop()
	root := e.NewRoot()
	root.SetArgs(args)
	command, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exit.OK
	}
	var status *statusError
	if errors.As(err, &status) {
		return status.code
	}
	code := vmproc.Classify(err)
	if _, ran := command.Annotations[ranAnnotation]; !ran && code == exit.Failure {
		// The command never started: cobra did not understand the words.
		code = exit.Usage
		err = fmt.Errorf("%w: see %s --help", err, command.CommandPath())
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = errors.New("interrupted")
	}
	fmt.Fprintf(e.Stderr, "ditto: %s\n", oneLine(err))
	return code
}

// statusError is an exit code that needs no words.
type statusError struct{ code int }

func (e *statusError) Error() string { return fmt.Sprintf("exit status %d", e.code) }

// ranAnnotation marks a command whose own code has run.
const ranAnnotation = "ran"

// oneLine joins the lines of an error.
func oneLine(err error) string {
	lines := strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' })
	return strings.Join(lines, "; ")
}

// NewRoot returns the command tree.
func (e *Env) NewRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "ditto",
		Short: "Run virtual machines on KVM",
		Long: `ditto runs virtual machines on KVM.

Without any flags, "ditto run" boots the newest cached Linux kernel with a
u-root userland and a network that needs no privileges.

` + exitCodesHelp(),
		Example: `  ditto run                                 # a shell in a small Linux
  ditto run -- cat /proc/cpuinfo            # one command, its output and status
  ditto run -d --name db --disk db.img      # in the background
  ditto ps
  ditto console db
  ditto snapshot db /var/snap/db1           # save it, as it is now
  ditto clone /var/snap/db1 -n 4            # four that go on from there
  ditto migrate db ssh://otherhost          # move it while it runs
  ditto stop db`,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			// Cobra does this later, when it would look like the command's own error.
			if err := errors.Join(cmd.ValidateRequiredFlags(), cmd.ValidateFlagGroups()); err != nil {
				return err
			}
			cmd.Annotations = map[string]string{ranAnnotation: ""}
			return nil
		},
	}
	root.SetOut(e.Stdout)
	root.SetErr(e.Stderr)
	if e.Stdin != nil {
		root.SetIn(e.Stdin)
	}
	root.AddGroup(&cobra.Group{ID: groupMachines, Title: "Machines:"}, &cobra.Group{ID: groupHost, Title: "Host and images:"})
	root.AddCommand(
		e.runCommand(), e.psCommand(), e.consoleCommand(), e.logsCommand(),
		e.stopCommand(), e.killCommand(), e.pauseCommand(), e.resumeCommand(),
		e.statsCommand(), e.inspectCommand(), e.memmapCommand(), e.balloonCommand(), e.diskCommand(),
		e.snapshotCommand(), e.restoreCommand(), e.cloneCommand(), e.migrateCommand(), e.receiveCommand(), e.upgradeCommand(),
		e.doctorCommand(), e.cpuCommand(), e.imageCommand(), e.pkiCommand(), e.versionCommand(),
	)
	root.InitDefaultCompletionCmd()
	return root
}

// The groups of the help text.
const (
	groupMachines = "machines"
	groupHost     = "host"
)

func exitCodesHelp() string {
	var b strings.Builder
	b.WriteString("Exit codes:\n")
	for _, m := range exit.Meanings() {
		fmt.Fprintf(&b, "  %2d  %s\n", m.Code, m.Text)
	}
	b.WriteString("With a command after --, and when it ran, its own status instead.")
	return b.String()
}

// isTerminal tells whether w is a terminal.
func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
