package cli

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/vmproc"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/registry"
)

// maxClones bounds the machines of one command.
const maxClones = 1000

func (e *Env) cloneCommand() *cobra.Command {
	f := &restoreFlags{}
	var n int
	var keep, asJSON bool
	cmd := &cobra.Command{
		Use:   "clone DIR",
		Short: "Start many machines from one that was saved",
		Long: `Start machines in the background that all go on where one was saved. They share
what they do not change: memory comes from the snapshot's files and the frozen
images of the disks, which the host keeps once for all of them.

Each has a name, a console, a generation ID and overlays of its own. The overlays
go with the machine, whatever ends it; with --keep they stay, as NAME/blkN.qcow2
in ~/.local/share/ditto or --overlay-dir. Only clones that keep theirs can be saved.

On networks that others can reach each clone has an address of its own, which a
Linux guest takes over when its driver starts anew. On user-mode networks, where
it is alone, it has the saved one. Port forwards of the saved machine are left
out: two machines cannot have one port.

A clone that cannot be started is told with the reason; the others run.`,
		Example: `  ditto clone /var/snap/web1
  ditto clone /var/snap/web1 -n 16 --name worker --json
  ditto stop $(ditto ps -q | grep ^worker-)`,
		GroupID:           groupMachines,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeSnapshot,
		RunE: func(cmd *cobra.Command, args []string) error {
			job, err := e.cloneJob(cmd, args[0], f, !keep)
			if err != nil {
				return err
			}
			names, err := e.cloneNames(job.Config.Name, n)
			if err != nil {
				return err
			}
			return e.clone(cmd.Context(), job, names, asJSON)
		},
	}
	fs := cmd.Flags()
	fs.IntVarP(&n, "number", "n", 1, "how many machines")
	fs.StringVar(&f.name, "name", "", "`PREFIX` of their names, PREFIX-1 and so on; default the name of the saved machine")
	fs.BoolVar(&keep, "keep", false, "keep the overlays of the disks when the machines end")
	addJSON(cmd, &asJSON)
	f.add(cmd)
	return cmd
}

// cloneJob is what all clones have in common, with the prefix as the name.
func (e *Env) cloneJob(cmd *cobra.Command, dir string, f *restoreFlags, temporary bool) (childJob, error) {
	level, err := parseLevel(f.logLevel)
	if err != nil {
		return childJob{}, err
	}
	m, err := openSaved(dir)
	if err != nil {
		return childJob{}, err
	}
	if f.name != "" {
		m.config.Name = f.name
	}
	if dropped := dropForwards(&m.config); len(dropped) > 0 {
		fmt.Fprintf(e.Stderr, "ditto: clones do not have the port forwards of the saved machine: %s\n", strings.Join(dropped, ", "))
	}
	if err := m.apply(&f.runFlags, cmd.Flags()); err != nil {
		return childJob{}, err
	}
	for i := range m.config.Nets {
		if m.config.Nets[i].Mode != config.NetUser {
			m.config.Nets[i].MAC = "" // made of each clone's name
		}
	}
	overlays, err := f.overlayDir()
	return childJob{Config: m.config, LogLevel: level, Restore: &vmproc.Restore{
		Dir: m.dir, ID: m.id, Mode: f.mode(), Overlays: overlays, Temporary: temporary,
	}}, err
}

// dropForwards takes the forwards out of a configuration and returns them.
func dropForwards(c *config.Config) (dropped []string) {
	c.Nets = slices.Clone(c.Nets)
	for i := range c.Nets {
		for _, f := range c.Nets[i].Forwards {
			dropped = append(dropped, f.String())
		}
		c.Nets[i].Forwards = nil
	}
	return dropped
}

// cloneNames returns n names that no machine has.
func (e *Env) cloneNames(prefix string, n int) ([]string, error) {
	if n < 1 || n > maxClones {
		return nil, exit.Errorf(exit.Usage, "-n %d is out of range: use 1 to %d", n, maxClones)
	}
	if prefix == "" {
		prefix = "clone"
	}
	r, err := e.Registry()
	if err != nil {
		return nil, err
	}
	running, err := names(r)
	if err != nil {
		return nil, err
	}
	var free []string
	for i := 1; len(free) < n; i++ {
		name := fmt.Sprintf("%s-%d", prefix, i)
		if !config.ValidName(name) {
			return nil, exit.Errorf(exit.Usage, "%q is not a usable name: use a --name of up to %d letters, digits, dots, dashes and underscores", name, config.MaxNameBytes-5)
		}
		if !slices.Contains(running, name) {
			free = append(free, name)
		}
	}
	return free, nil
}

// cloneRow is a clone as JSON.
type cloneRow struct {
	Name       string   `json:"name"`
	PID        int      `json:"pid,omitempty"`
	StartMs    float64  `json:"start_ms"` // until its guest ran
	Disks      []string `json:"disks,omitempty"`
	ConsoleLog string   `json:"console_log,omitempty"`
	Error      string   `json:"error,omitempty"`

	err error
}

// clone starts a machine for each name, some at a time, and shows what became of
// them.
func (e *Env) clone(ctx context.Context, job childJob, names []string, asJSON bool) error {
	progress := e.newProgress()
	defer progress.close()
	rows := make([]cloneRow, len(names))
	turns := make(chan struct{}, max(2, runtime.NumCPU()))
	var mu sync.Mutex // guards progress
	done := 0
	var starting sync.WaitGroup
	for i, name := range names {
		starting.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			rows[i] = e.cloneOne(ctx, job, name)
			mu.Lock()
			defer mu.Unlock()
			if done++; isTerminal(e.Stderr) {
				progress.Report("clone", float64(done)/float64(len(names)))
			}
		})
	}
	starting.Wait()
	progress.close()
	if err := e.printClones(rows, asJSON); err != nil {
		return err
	}
	return cloneErrors(rows)
}

// cloneOne starts one machine.
func (e *Env) cloneOne(ctx context.Context, job childJob, name string) cloneRow {
	row := cloneRow{Name: name}
	job.Config.Name = name
	began := time.Now()
	var child *child
	if row.err = ctx.Err(); row.err == nil {
		child, row.err = e.startChild(ctx, job)
	}
	if row.err != nil {
		row.Error = oneLine(row.err)
		return row
	}
	row.StartMs, row.PID = milliseconds(time.Since(began)), child.process.Pid
	r, err := e.Registry()
	if err != nil {
		return row
	}
	row.ConsoleLog = r.LogPath(name)
	if vm, err := r.Find(name); err == nil && !job.Restore.Temporary {
		row.Disks = ownDisks(vm)
	}
	return row
}

// ownDisks are the files that a machine writes its disks to.
func ownDisks(vm registry.VM) (paths []string) {
	for _, d := range vm.Disks {
		if !d.ReadOnly {
			paths = append(paths, d.Path)
		}
	}
	return paths
}

func (e *Env) printClones(rows []cloneRow, asJSON bool) error {
	if asJSON {
		return e.printJSON(rows)
	}
	table := [][]string{{"NAME", "PID", "STARTED IN", "DISKS"}}
	for _, row := range rows {
		if row.err != nil {
			table = append(table, []string{row.Name, "-", "-", "not started"})
			continue
		}
		disks := strings.Join(row.Disks, " ")
		if disks == "" {
			disks = "-"
		}
		table = append(table, []string{row.Name, fmt.Sprint(row.PID), fmt.Sprintf("%.1fms", row.StartMs), disks})
	}
	return e.table(table)
}

// cloneErrors says which clones were not started, and why: once for each reason.
func cloneErrors(rows []cloneRow) error {
	var failed []string
	var first error
	reasons := map[string][]string{}
	for _, row := range rows {
		if row.err == nil {
			continue
		}
		if first == nil {
			first = row.err
		}
		if len(reasons[row.Error]) == 0 {
			failed = append(failed, row.Error)
		}
		reasons[row.Error] = append(reasons[row.Error], row.Name)
	}
	if first == nil || errors.Is(first, context.Canceled) {
		return first
	}
	for i, reason := range failed {
		failed[i] = fmt.Sprintf("%s not started: %s", strings.Join(reasons[reason], ", "), reason)
	}
	return exit.Errorf(vmproc.Classify(first), "%s", strings.Join(failed, "; "))
}
