package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/registry"
)

// lookFlags say how to look at a machine's memory.
type lookFlags struct {
	quick, exact bool
}

func (f *lookFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.quick, "quick", false, "do not read memory: only what the book of names and the host's page tables say")
	cmd.Flags().BoolVar(&f.exact, "exact", false, "pause the machine meanwhile, and resume it afterwards")
}

func (f *lookFlags) query() api.MemoryQuery {
	return api.MemoryQuery{Full: !f.quick, Pause: f.exact}
}

// bound limits how long an answer may take: reading all of a large memory takes
// as long as it takes, and the user can interrupt it.
func (f *lookFlags) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	if f.quick && !f.exact {
		return context.WithTimeout(ctx, answerTimeout)
	}
	return context.WithCancel(ctx)
}

func (e *Env) inspectCommand() *cobra.Command {
	var asJSON, watch bool
	var look lookFlags
	interval := time.Second
	cmd := &cobra.Command{
		Use:   "inspect NAME",
		Short: "Show what a machine's memory equals, and how it is mapped",
		Long: `Show how much of a machine's memory is zero, equals blocks of which disk, equals
another page, or is unique; and how much of it the host maps with 2 MiB at once.

All of memory is read for that, at some GiB a second. The machine runs on, so the
numbers are approximate; with --exact it is paused meanwhile. With --quick memory
is not read: what was not recorded as it came from disk is then unknown.

--watch looks again and again, quickly, until Ctrl-C.`,
		Example: `  ditto inspect web
  ditto inspect web --exact
  ditto inspect web --watch --interval 5s
  ditto inspect web --quick --json | jq .frames`,
		GroupID:           groupMachines,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: e.completeOne,
		RunE: func(cmd *cobra.Command, args []string) error {
			if interval < 100*time.Millisecond || interval > time.Hour {
				return exit.Errorf(exit.Usage, "--interval %s is out of range: use 100ms to 1h", interval)
			}
			if watch {
				return e.watch(cmd.Context(), args[0], interval)
			}
			return e.forEach(cmd.Context(), args, func(ctx context.Context, _ *registry.Registry, vm registry.VM, remote *api.Remote) error {
				ctx, cancel := look.bound(ctx)
				defer cancel()
				memory, err := remote.Memory(ctx, look.query())
				if err != nil {
					return lookError(err, vm.Name)
				}
				if asJSON {
					return e.printJSON(memory)
				}
				_, err = io.WriteString(e.Stdout, inspection(vm.Name, memory, 0))
				return err
			})
		},
	}
	addJSON(cmd, &asJSON)
	look.add(cmd)
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "go on looking, quickly, until Ctrl-C")
	cmd.Flags().DurationVar(&interval, "interval", interval, "between two looks of --watch")
	for _, other := range []string{"json", "exact", "quick"} {
		cmd.MarkFlagsMutuallyExclusive("watch", other)
	}
	return cmd
}

// lookError says what to do about a failed look at memory.
func lookError(err error, name string) error {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s does not answer: ditto logs --ditto %s may tell why", name, name)
	case errors.Is(err, api.ErrWrongState):
		return fmt.Errorf("%w: see ditto ps", err)
	}
	return err
}
