package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/registry"
)

// killTimeout is how long a killed machine may take to end.
const killTimeout = 15 * time.Second

func (e *Env) stopCommand() *cobra.Command {
	grace := 30 * time.Second
	cmd := &cobra.Command{
		Use:   "stop NAME...",
		Short: "Power machines off, and wait until they are",
		Long: `Press the machines' power button and wait until they have powered off. A guest
that does not listen to the button is killed when the grace is over; the exit
code then is 12.`,
		Example: `  ditto stop web
  ditto stop --grace 2m db1 db2`,
		GroupID:           groupMachines,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeRunning,
		RunE: func(cmd *cobra.Command, args []string) error {
			if grace < 0 || grace > time.Hour {
				return exit.Errorf(exit.Usage, "--grace %s is out of range: use 0s to 1h", grace)
			}
			return e.forEach(cmd.Context(), args, func(ctx context.Context, r *registry.Registry, vm registry.VM, remote *api.Remote) error {
				if err := remote.Stop(ctx, grace); err != nil {
					return err
				}
				if err := waitGone(ctx, r, vm, grace+killTimeout); err != nil {
					return err
				}
				if last, err := r.LastExit(vm.Name); err == nil && last.Reason == "killed" {
					return exit.Errorf(exit.Killed, "%s did not power off within %s and was killed", vm.Name, grace)
				}
				return nil
			})
		},
	}
	cmd.Flags().DurationVar(&grace, "grace", grace, "how long the guest gets before it is killed")
	return cmd
}

func (e *Env) killCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "kill NAME...",
		Short: "End machines at once",
		Long: `End machines at once, as pulling the plug does: what the guest has not flushed
is lost.`,
		Example:           "  ditto kill web",
		GroupID:           groupMachines,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeRunning,
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.forEach(cmd.Context(), args, func(ctx context.Context, r *registry.Registry, vm registry.VM, remote *api.Remote) error {
				if err := remote.Kill(ctx); err != nil {
					return err
				}
				return waitGone(ctx, r, vm, killTimeout)
			})
		},
	}
}

// waitGone waits for the end of a machine's process.
func waitGone(ctx context.Context, r *registry.Registry, vm registry.VM, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := r.Wait(ctx, vm)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%s has not ended after %s: kill its process %d", vm.Name, limit, vm.PID)
	}
	return err
}

func (e *Env) pauseCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "pause NAME...",
		Short:             "Stop the vCPUs of machines until they are resumed",
		Example:           "  ditto pause web",
		GroupID:           groupMachines,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeRunning,
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.forEach(cmd.Context(), args, func(ctx context.Context, _ *registry.Registry, _ registry.VM, remote *api.Remote) error {
				return remote.Pause(ctx)
			})
		},
	}
}

func (e *Env) resumeCommand() *cobra.Command {
	var takeBack bool
	cmd := &cobra.Command{
		Use:   "resume NAME...",
		Short: "Let paused machines run on",
		Long: `Let paused machines run on.

With --take-back, also a machine that stands still because the outcome of its
migration is not known (state in-doubt in 'ditto ps'): the connection ended in the
moment in which the other host was to take over. Make sure that it does not run
there. Two machines that write one disk destroy it; ditto takes the locks of the
disks again, which fails if the other one has them on storage that both see.`,
		Example: `  ditto resume web
  ditto resume --take-back web`,
		GroupID:           groupMachines,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeRunning,
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.forEach(cmd.Context(), args, func(ctx context.Context, _ *registry.Registry, _ registry.VM, remote *api.Remote) error {
				if takeBack {
					return remote.TakeBack(ctx)
				}
				return remote.Resume(ctx)
			})
		},
	}
	cmd.Flags().BoolVar(&takeBack, "take-back", false, "take back a machine whose migration is in doubt: it does not run at the destination")
	return cmd
}

func (e *Env) balloonCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "balloon NAME [SIZE]",
		Short: "Show or set how much memory is taken back from a guest",
		Long: `Show how much of the guest's memory the balloon holds, and what the guest says
about the rest. With a size, ask the guest to give up that much; it does so as
fast as it can free memory.`,
		Example: `  ditto balloon web
  ditto balloon web 256M
  ditto balloon web 0`,
		GroupID:           groupMachines,
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: e.completeOne,
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.forEach(cmd.Context(), args[:1], func(ctx context.Context, _ *registry.Registry, _ registry.VM, remote *api.Remote) error {
				ctx, cancel := context.WithTimeout(ctx, answerTimeout)
				defer cancel()
				if len(args) == 2 {
					size, err := config.ParseBytes(args[1])
					if err != nil {
						return exit.New(exit.Usage, err)
					}
					return remote.SetBalloon(ctx, uint64(size))
				}
				balloon, err := remote.Balloon(ctx)
				if err != nil {
					return err
				}
				if asJSON {
					return e.printJSON(balloon)
				}
				rows := [][]string{{"target", humanBytes(balloon.TargetBytes)}, {"actual", humanBytes(balloon.ActualBytes)}}
				return e.table(append(rows, counterRows("guest ", balloon.Guest)...))
			})
		},
	}
	addJSON(cmd, &asJSON)
	return cmd
}
