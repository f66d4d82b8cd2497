package cli

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"ditto.vm/migration/live"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/registry"
)

// psRow is one machine as ps --json prints it.
type psRow struct {
	Name        string     `json:"name"`
	PID         int        `json:"pid"`
	State       string     `json:"state"`
	CPUs        int        `json:"cpus"`
	MemoryBytes uint64     `json:"memory_bytes"`
	Kernel      string     `json:"kernel"`
	Started     *time.Time `json:"started,omitempty"`
	UptimeMs    int64      `json:"uptime_ms"`
	ConsoleLog  string     `json:"console_log"`
	// Migration is of a machine that is on its way to another host.
	Migration *api.Migration `json:"migration,omitempty"`
}

func (e *Env) psCommand() *cobra.Command {
	var asJSON, quiet bool
	cmd := &cobra.Command{
		Use:     "ps",
		Aliases: []string{"ls", "list"},
		Short:   "List running machines",
		Long: `List the machines of this user that are running, with their state.

A machine that is only starting, comes from another host, is on its way to one,
or does not answer, is listed as such. One that is in-doubt stands still: see
'ditto resume --help'.`,
		Example: `  ditto ps
  ditto ps --json | jq -r '.[].name'
  ditto stop $(ditto ps -q)`,
		GroupID:           groupMachines,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := e.Registry()
			if err != nil {
				return err
			}
			vms, err := r.List()
			if err != nil {
				return err
			}
			if quiet {
				for _, vm := range vms {
					fmt.Fprintln(e.Stdout, vm.Name)
				}
				return nil
			}
			rows := describe(cmd.Context(), vms)
			if asJSON {
				return e.printJSON(rows)
			}
			table := [][]string{{"NAME", "STATE", "PID", "CPUS", "MEMORY", "UPTIME", "KERNEL"}}
			for _, row := range rows {
				table = append(table, []string{
					row.Name, row.State, fmt.Sprint(row.PID), fmt.Sprint(row.CPUs), humanBytes(row.MemoryBytes),
					humanDuration(time.Duration(row.UptimeMs) * time.Millisecond), row.Kernel,
				})
			}
			return e.table(table)
		},
	}
	addJSON(cmd, &asJSON)
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print names only")
	return cmd
}

// describe asks all machines at once.
func describe(ctx context.Context, vms []registry.VM) []psRow {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	rows := make([]psRow, len(vms))
	var wg sync.WaitGroup
	for i, vm := range vms {
		wg.Go(func() { rows[i] = describeOne(ctx, vm) })
	}
	wg.Wait()
	return rows
}

func describeOne(ctx context.Context, vm registry.VM) psRow {
	row := psRow{
		Name: vm.Name, PID: vm.PID, State: "starting", CPUs: vm.CPUs,
		MemoryBytes: vm.Memory, Kernel: vm.Kernel, ConsoleLog: vm.Log,
	}
	if vm.Started.IsZero() {
		return row
	}
	row.State, row.Started, row.UptimeMs = "unresponsive", &vm.Started, time.Since(vm.Started).Milliseconds()
	if vm.Incoming {
		row.State = "incoming" // until it answers
	}
	remote, err := api.Dial(vm.APISocket())
	if err != nil {
		return row
	}
	defer remote.Close()
	info, err := remote.Info(ctx)
	if err != nil {
		return row
	}
	row.State, row.UptimeMs, row.Migration = string(info.State), info.UptimeMs, info.Migration
	if m := info.Migration; m != nil {
		row.State = "migrating"
		if m.Phase == string(live.PhaseInDoubt) {
			row.State = m.Phase
		}
	}
	return row
}
