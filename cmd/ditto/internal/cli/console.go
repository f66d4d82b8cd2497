package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/terminal"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/registry"
)

// quitGrace is what Ctrl-a x gives the guest to power itself off.
const quitGrace = 30 * time.Second

func (e *Env) consoleCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "console NAME",
		Aliases: []string{"attach"},
		Short:   "Join this terminal to a machine's console",
		Long: `Join this terminal to the console of a running machine. The latest output is
shown first. Several terminals may be joined at once; all can type.

Keys: ` + terminal.HelpText + `.`,
		Example:           "  ditto console web",
		GroupID:           groupMachines,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: e.completeOne,
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := e.Registry()
			if err != nil {
				return err
			}
			vm, err := find(r, args[0])
			if err != nil {
				return err
			}
			result, err := e.attach(cmd.Context(), vm, e.Stdout)
			if err != nil {
				return err
			}
			if result == terminal.Detached {
				e.notice("detached; ditto console %s brings it back", vm.Name)
				return nil
			}
			// How it ended is written when the console has ended already.
			if err := waitGone(cmd.Context(), r, vm, killTimeout); err != nil {
				return err
			}
			e.notice("%s has ended%s", vm.Name, howEnded(r, vm.Name))
			return nil
		},
	}
}

// attach joins the terminal to a machine's console until one of them ends it.
func (e *Env) attach(ctx context.Context, vm registry.VM, out io.Writer) (terminal.Result, error) {
	conn, err := net.Dial("unix", vm.ConsoleSocket())
	if err != nil {
		return terminal.Ended, fmt.Errorf("console of %s: %w", vm.Name, err)
	}
	remote, err := api.Dial(vm.APISocket())
	if err != nil {
		return terminal.Ended, errors.Join(err, conn.Close())
	}
	defer remote.Close()
	interactive := isTerminal(e.Stdin)
	return terminal.Session{
		Stdin: e.Stdin, Stdout: out, Notice: e.Stderr, Keys: interactive,
		Resize: func(columns, rows uint16) {
			ctx, cancel := context.WithTimeout(ctx, answerTimeout)
			defer cancel()
			// A guest that was not told shows text in the wrong places; that
			// is no reason to end the session.
			_ = remote.ResizeConsole(ctx, columns, rows)
		},
		Stop: func(times int) {
			ctx, cancel := context.WithTimeout(ctx, answerTimeout)
			defer cancel()
			var err error
			if times == 0 {
				fmt.Fprint(e.Stderr, "\r\n[ditto: pressing the power button; Ctrl-a x again kills]\r\n")
				err = remote.Stop(ctx, quitGrace)
			} else {
				err = remote.Kill(ctx)
			}
			if err != nil {
				fmt.Fprintf(e.Stderr, "\r\n[ditto: %s]\r\n", oneLine(err))
			}
		},
	}.Run(ctx, conn)
}

// notice says something of ditto's own on a terminal that a guest wrote to.
func (e *Env) notice(format string, args ...any) {
	if isTerminal(e.Stdin) {
		fmt.Fprintf(e.Stderr, "\r\n[ditto: %s]\r\n", fmt.Sprintf(format, args...))
	}
}

// howEnded tells the reason of a machine's end, if it is known.
func howEnded(r *registry.Registry, name string) string {
	last, err := r.LastExit(name)
	switch {
	case err != nil:
		return ""
	case last.Error != "":
		return ": " + last.Error
	case last.Reason == "poweroff":
		return ""
	case last.Where != "":
		return ": it went to " + last.Where
	}
	return ": " + last.Reason
}

// lastCode turns the last exit of a machine into an error or a status.
func lastCode(r *registry.Registry, name string) error {
	last, err := r.LastExit(name)
	switch {
	case err != nil:
		return exit.Errorf(exit.GuestError, "the process of %s ended without a word: see %s", name, r.StateDir(name))
	case last.Error != "":
		return exit.Errorf(last.Code, "%s", last.Error)
	case last.Code != exit.OK:
		return &statusError{last.Code}
	}
	return nil
}
