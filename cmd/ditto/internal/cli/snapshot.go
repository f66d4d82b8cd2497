package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm"
	"ditto.vm/vmm/lend"
	"ditto.vm/vmm/lend/remotesave"
	"ditto.vm/vmm/registry"
	"ditto.vm/vmm/savehost"
)

// snapshotFlags are the flags of snapshot.
type snapshotFlags struct {
	parent, compress     string
	stop, paused, asJSON bool
}

func (e *Env) snapshotCommand() *cobra.Command {
	f := &snapshotFlags{}
	cmd := &cobra.Command{
		Use:   "snapshot NAME DIR",
		Short: "Save a running machine, and look after what was saved",
		Long: `Save a running machine into a new folder: its memory, its devices, and its disks
as they are at that moment. The machine goes on while most of it is saved, and
stands still for a moment at the end. Memory that equals blocks of disks is not
stored: the snapshot says which.

The machine's disks are frozen: what it writes from then on goes into overlays
beside them, DISK.DIR.qcow2, and the files below lose their write permission. Keep
them as long as the snapshot.

With --parent only what was written since that snapshot of the machine is stored.

Ctrl-C cancels: the machine goes on, and nothing is left of the snapshot.

With --json, a line for each event: {"event":"progress",...}, and at the end
{"event":"saved",...}.`,
		Example: `  ditto snapshot web /var/snap/web1
  ditto snapshot web /var/snap/web2 --parent /var/snap/web1
  ditto snapshot web /var/snap/last --stop --compress zstd
  ditto restore /var/snap/web1
  ditto clone /var/snap/web1 -n 16`,
		GroupID:           groupMachines,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: e.completeSave,
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.save(cmd.Context(), args[0], args[1], f)
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&f.parent, "parent", "", "store only what was written since the snapshot in this `FOLDER`")
	fs.StringVar(&f.compress, "compress", string(snapshot.None), "compression of what is stored: none, which a restore can map, or zstd")
	fs.BoolVar(&f.stop, "stop", false, "end the machine when it is saved; its disks get no overlays")
	fs.BoolVar(&f.paused, "paused", false, "pause the machine before instead of saving while it runs")
	fs.BoolVar(&f.asJSON, "json", false, "print events as JSON, one a line")
	cmd.AddCommand(e.snapshotCare()...)
	_ = cmd.RegisterFlagCompletionFunc("parent", completeSnapshots)
	_ = cmd.RegisterFlagCompletionFunc("compress", cobra.FixedCompletions([]string{"none", "zstd"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// completeSave completes the name of a machine, and then a folder.
func (e *Env) completeSave(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	switch len(args) {
	case 0:
		return e.completeRunning(cmd, args, word)
	case 1:
		return nil, cobra.ShellCompDirectiveFilterDirs
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// saveProgress is an event of a save as JSON.
type saveProgress struct {
	Event      string        `json:"event"` // progress
	Phase      vmm.SavePhase `json:"phase"`
	DoneBytes  uint64        `json:"done_bytes"`
	TotalBytes uint64        `json:"total_bytes"`
}

// saveResult is the end of a save as JSON.
type saveResult struct {
	Event       string         `json:"event"` // saved
	Name        string         `json:"name"`
	Path        string         `json:"path"`
	ID          snapshot.ID    `json:"id"`
	Parent      string         `json:"parent,omitempty"`
	PauseMs     float64        `json:"pause_ms"`
	TookMs      float64        `json:"took_ms"`
	MemoryBytes uint64         `json:"memory_bytes"`
	StoredBytes uint64         `json:"stored_bytes"`
	Holds       snapshot.Holds `json:"holds"`
	Rounds      int            `json:"rounds"`
	// Disks are the files that the machine writes to from now on, "" for those
	// that it does not write.
	Disks []string `json:"disks"`
}

// save saves a running machine.
func (e *Env) save(ctx context.Context, name, dir string, f *snapshotFlags) error {
	r, err := e.Registry()
	if err != nil {
		return err
	}
	vm, err := find(r, name)
	if err != nil {
		return err
	}
	o, path, err := f.options(dir)
	if err != nil {
		return err
	}
	host, err := savehost.NewLocal(path, savehost.Options{
		Parent: o.Parent, Machine: fmt.Sprintf("%d, %s", vm.PID, vm.Started.Format(time.RFC3339Nano)), Check: remotesave.CheckDisks(vm.Disks),
	})
	if err != nil {
		return saveError(err, name, path)
	}
	progress := e.newProgress()
	defer progress.close()
	o.Progress = e.saveProgress(progress, f.asJSON)
	report, err := remotesave.Call(ctx, vm.OpsSocket(), host, o)
	if err == nil && isTerminal(e.Stderr) && !f.asJSON {
		progress.Report(string(vmm.SaveCommit), 1)
	}
	progress.close()
	if err != nil {
		return saveError(errors.Join(err, e.abandon(ctx, r, vm, host, err)), name, path)
	}
	if f.stop {
		if err := waitGone(ctx, r, vm, killTimeout); err != nil {
			return err
		}
	}
	return e.printSaved(vm, path, report, f)
}

// options are the flags as a save takes them, and the path of the snapshot.
func (f *snapshotFlags) options(dir string) (o vmm.SaveOptions, path string, err error) {
	o = vmm.SaveOptions{Compression: snapshot.Compression(f.compress), Stop: f.stop, Paused: f.paused}
	if o.Compression != snapshot.None && o.Compression != snapshot.Zstd {
		return o, "", exit.Errorf(exit.Usage, "--compress %q is unknown: use none or zstd", f.compress)
	}
	if path, err = filepath.Abs(dir); err != nil || f.parent == "" {
		return o, path, err
	}
	if o.Parent, err = filepath.Abs(f.parent); err != nil {
		return o, "", err
	}
	o.ParentPath = o.Parent
	// Neighbours stay neighbours when their folder is moved.
	if filepath.Dir(o.Parent) == filepath.Dir(path) {
		o.ParentPath = filepath.Join("..", filepath.Base(o.Parent))
	}
	return o, path, nil
}

// saveProgress returns what hears how far a save is.
func (e *Env) saveProgress(bar *progress, asJSON bool) func(vmm.SaveProgress) {
	lines := json.NewEncoder(e.Stdout)
	var last vmm.SavePhase
	return func(p vmm.SaveProgress) {
		switch {
		case asJSON:
			_ = lines.Encode(saveProgress{"progress", p.Phase, p.Done, p.Total}) // the result tells a failure
		case isTerminal(e.Stderr):
			if last != "" && last != p.Phase {
				bar.Report(string(last), 1)
			}
			last = p.Phase
			bar.Report(string(p.Phase), float64(p.Done)/float64(max(p.Total, 1)))
		}
	}
}

// abandon cleans up after a save that failed. A machine that goes on has undone
// it; after one that has ended, what it did not use is removed.
func (e *Env) abandon(ctx context.Context, r *registry.Registry, vm registry.VM, host *savehost.Local, failed error) error {
	if !errors.Is(failed, lend.ErrGone) && !errors.Is(failed, lend.ErrEnding) {
		return host.Abort()
	}
	if err := waitGone(context.WithoutCancel(ctx), r, vm, killTimeout); err != nil {
		// It may still use the overlays.
		return errors.Join(err, host.Abort())
	}
	whole, kept, err := host.Abandon()
	if len(kept) > 0 {
		err = errors.Join(err, fmt.Errorf("what it wrote last is in %v", kept))
	}
	if whole {
		return errors.Join(fmt.Errorf("%s ended just when it was saved%s: the snapshot is whole", vm.Name, howEnded(r, vm.Name)), err)
	}
	return errors.Join(fmt.Errorf("%s ended before it was saved%s", vm.Name, howEnded(r, vm.Name)), err)
}

// saveError says what to do about a save that failed.
func saveError(err error, name, path string) error {
	cure := ""
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, snapshot.ErrExists):
		cure = "choose another folder, or remove it with 'ditto snapshot rm'"
	case errors.Is(err, snapshot.ErrBusy):
		cure = "wait until that one is done"
	case errors.Is(err, snapshot.ErrNoSpace):
		cure = "free some, or save to another file system"
	case errors.Is(err, snapshot.ErrParent):
		cure = "save without --parent"
	case errors.Is(err, lend.ErrProtocol):
		return exit.New(exit.Snapshot, err)
	case errors.Is(err, fs.ErrNotExist) && !exists(filepath.Dir(path)):
		cure = "make the folder that it is to be in"
	default:
		return exit.New(exit.Snapshot, fmt.Errorf("%s is not saved: %w", name, err))
	}
	return exit.New(exit.Snapshot, fmt.Errorf("%s is not saved: %w: %s", name, err, cure))
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// printSaved says what was saved.
func (e *Env) printSaved(vm registry.VM, path string, r vmm.SaveReport, f *snapshotFlags) error {
	if f.asJSON {
		return json.NewEncoder(e.Stdout).Encode(saveResult{
			Event: "saved", Name: vm.Name, Path: path, ID: r.ID, Parent: r.Parent,
			PauseMs: milliseconds(r.Pause), TookMs: milliseconds(r.Took),
			MemoryBytes: vm.Memory, StoredBytes: r.Stored, Holds: r.Holds, Rounds: r.Rounds, Disks: r.Overlays,
		})
	}
	what := "stood still for " + r.Pause.Round(10*time.Microsecond).String()
	if f.stop {
		what = "has ended"
	}
	_, err := fmt.Fprintf(e.Stdout, "%s: %s of %s stored, in %s; %s %s\n", path,
		humanBytes(r.Stored), humanBytes(vm.Memory), r.Took.Round(time.Millisecond), vm.Name, what)
	for i, overlay := range r.Overlays {
		if overlay != "" && err == nil {
			_, err = fmt.Fprintf(e.Stdout, "disk %d is frozen; it goes on in %s\n", i, overlay)
		}
	}
	return err
}

// milliseconds is a time span in fractions of a millisecond.
func milliseconds(d time.Duration) float64 {
	return float64(d.Microseconds()) / 1000
}
