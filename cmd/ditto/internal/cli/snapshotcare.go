package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/vmproc"
	"ditto.vm/migration/snapshot"
)

// snapshotCare are the commands that look after snapshots.
func (e *Env) snapshotCare() []*cobra.Command {
	return []*cobra.Command{
		e.snapshotListCommand(), e.snapshotInspectCommand(), e.snapshotVerifyCommand(),
		e.snapshotRemoveCommand(), e.snapshotExportCommand(), e.snapshotImportCommand(),
	}
}

// snapshotError gives err the exit code of a bad snapshot unless it has its own. A
// layer that is missing is no disk that somebody named.
func snapshotError(err error) error {
	if err == nil || vmproc.Classify(err) != exit.Failure && !errors.Is(err, snapshot.ErrLayer) {
		return err
	}
	return exit.New(exit.Snapshot, err)
}

// snapshotRow is a snapshot in a list as JSON.
type snapshotRow struct {
	Path        string    `json:"path"`
	ID          string    `json:"id,omitempty"`
	Machine     string    `json:"machine,omitempty"`
	Created     time.Time `json:"created,omitzero"`
	MemoryBytes uint64    `json:"memory_bytes"`
	StoredBytes uint64    `json:"stored_bytes"`
	Parent      string    `json:"parent,omitempty"`
	Depth       int       `json:"depth"`
	// Error says why it cannot be used.
	Error string `json:"error,omitempty"`
}

// machineName is the name that a configuration gives, "" for none.
func machineName(m *snapshot.Manifest) string {
	var c struct {
		Name string `json:"name"`
	}
	if len(m.Config) > 0 && json.Unmarshal(m.Config, &c) != nil {
		return ""
	}
	return c.Name
}

func describeSnapshot(s snapshot.Entry) snapshotRow {
	row := snapshotRow{Path: s.Path, StoredBytes: s.Stored}
	if s.Err != nil {
		row.Error = oneLine(s.Err)
	}
	m := s.Manifest
	if m == nil {
		return row
	}
	row.ID, row.Machine, row.Created, row.MemoryBytes, row.Depth = s.ID.String(), machineName(m), m.Created, m.Memory.Size, m.Depth()
	if m.Parent != nil {
		row.Parent = m.Parent.Path
	}
	return row
}

// state says in a word whether a snapshot can be used.
func (r snapshotRow) state(err error) string {
	switch {
	case err == nil:
		return "-"
	case errors.Is(err, snapshot.ErrVersion):
		return "newer version"
	}
	return "damaged"
}

// orDash is a word, or a dash for none.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func (e *Env) snapshotListCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "ls [DIR...]",
		Short: "List the snapshots in folders",
		Long: `List the snapshots in folders and below, or in this folder. Only manifests are read;
'ditto snapshot verify' reads the rest.`,
		Example: `  ditto snapshot ls /var/snap
  ditto snapshot ls --json /var/snap | jq -r .[].path`,
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				args = []string{"."}
			}
			out := []snapshotRow{}
			rows := [][]string{{"PATH", "MACHINE", "CREATED", "MEMORY", "STORED", "PARENT", "STATE"}}
			for _, dir := range args {
				all, err := snapshot.List(dir)
				if err != nil {
					return snapshotError(err)
				}
				for _, s := range all {
					d := describeSnapshot(s)
					out = append(out, d)
					created, memory := "-", "-"
					if s.Manifest != nil {
						created, memory = d.Created.Local().Format(time.DateTime), humanBytes(d.MemoryBytes)
					}
					rows = append(rows, []string{d.Path, orDash(d.Machine), created, memory, humanBytes(d.StoredBytes), orDash(d.Parent), d.state(s.Err)})
				}
			}
			if asJSON {
				return e.printJSON(out)
			}
			return e.table(rows)
		},
		ValidArgsFunction: completeFolders,
	}
	addJSON(cmd, &asJSON)
	return cmd
}

// completeFolders completes the names of folders.
func completeFolders(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveFilterDirs
}

// shares returns what hears of a step of something slow, as a bar on a terminal.
func (e *Env) shares(p *progress, of string) func(step string, done, total uint64) {
	if !isTerminal(e.Stderr) {
		return nil
	}
	return func(step string, done, total uint64) {
		p.Report(step+" "+of, float64(done)/float64(max(total, 1)))
	}
}

func (e *Env) snapshotVerifyCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "verify DIR...",
		Short: "Read every byte of snapshots",
		Long: `Read every byte of snapshots and of their ancestors, and every block that pages are
named by, and say what is not as it was.`,
		Example:           `  ditto snapshot verify /var/snap/web1`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeSnapshots,
		RunE: func(cmd *cobra.Command, args []string) error {
			progress := e.newProgress()
			defer progress.close()
			var errs []error
			for _, dir := range args {
				err := e.verifySnapshot(cmd, progress, dir)
				if cmd.Context().Err() != nil {
					return err
				}
				errs = append(errs, err)
			}
			return snapshotError(errors.Join(errs...))
		},
	}
}

func (e *Env) verifySnapshot(cmd *cobra.Command, p *progress, dir string) (err error) {
	s, err := snapshot.Open(dir, snapshot.OpenOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	var o snapshot.LoadOptions
	if heard := e.shares(p, filepath.Base(dir)); heard != nil {
		o.Progress = func(done, total uint64) { heard("verify", done, total) }
	}
	if err := s.Verify(cmd.Context(), o); err != nil {
		return err
	}
	p.end()
	_, err = fmt.Fprintf(e.Stdout, "%s: intact, %s of memory, with %d ancestors\n", dir, humanBytes(s.Manifest().Memory.Size), s.Manifest().Depth())
	return err
}
