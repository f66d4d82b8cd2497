package cli

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/migration/snapshot"
)

// snapshotInfo is what a snapshot holds, as JSON.
type snapshotInfo struct {
	snapshotRow
	Ditto       string               `json:"ditto"`
	Compression snapshot.Compression `json:"compression"`
	Holds       snapshot.Holds       `json:"holds"`
	PagesBytes  uint64               `json:"pages_bytes"`
	MapBytes    uint64               `json:"pagemap_bytes"`
	Sections    []snapshotSection    `json:"sections"`
	Layers      []snapshotLayer      `json:"layers"`
	// Ancestors are the folders of the parent, its parent and so on.
	Ancestors []string `json:"ancestors"`
	// Dependents are the snapshots beside it that have it as their parent.
	Dependents []string `json:"dependents"`
}

type snapshotSection struct {
	Name    string `json:"name"`
	Version uint32 `json:"version"`
	Bytes   uint64 `json:"bytes"`
}

// snapshotLayer is a layer that pages may be named by.
type snapshotLayer struct {
	Path      string `json:"path"` // as it is found now
	ID        string `json:"id"`
	Format    string `json:"format"`
	SizeBytes int64  `json:"size_bytes"`
	// NamedBytes is how much of memory is named by it.
	NamedBytes uint64 `json:"named_bytes"`
	// State is unchanged, missing, changed, or touched: its content has to be
	// read to know.
	State string `json:"state"`
	Error string `json:"error,omitempty"`
}

func (e *Env) snapshotInspectCommand() *cobra.Command {
	var asJSON bool
	var output, format string
	cmd := &cobra.Command{
		Use:   "inspect DIR",
		Short: "Show what a snapshot holds",
		Long: `Show what a snapshot holds: what memory equals, by which disks it is named and whether
they are as they were, its ancestors, and the snapshots beside it that depend on it.
A disk is unchanged if its file was not written since; of one that is touched or was
copied, 'ditto snapshot verify' reads what matters.

-o draws a picture as 'ditto memmap' does of a running machine.`,
		Example: `  ditto snapshot inspect /var/snap/web1
  ditto snapshot inspect /var/snap/web1 -o web1.png
  ditto snapshot inspect --json /var/snap/web1 | jq .holds`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeSnapshot,
		RunE: func(_ *cobra.Command, args []string) (err error) {
			s, err := snapshot.Open(args[0], snapshot.OpenOptions{})
			if err != nil {
				return snapshotError(err)
			}
			defer func() { err = errors.Join(err, s.Close()) }()
			if output != "" {
				draw, err := e.drawing(output, format)
				if err != nil {
					return exit.New(exit.Usage, err)
				}
				var picture bytes.Buffer
				if err := draw(snapshotPicture(s), &picture); err != nil {
					return fmt.Errorf("%s: %w", args[0], err)
				}
				return e.putPicture(output, picture.Bytes())
			}
			info, err := inspectSnapshot(s)
			if err != nil {
				return snapshotError(err)
			}
			if asJSON {
				return e.printJSON(info)
			}
			return e.printSnapshot(info)
		},
	}
	addJSON(cmd, &asJSON)
	cmd.Flags().StringVarP(&output, "output", "o", "", "draw a picture: FILE.png, FILE.svg, or - for standard output")
	cmd.Flags().StringVar(&format, "format", "", "png or svg; default what FILE ends in, or png")
	cmd.MarkFlagsMutuallyExclusive("json", "output")
	_ = cmd.MarkFlagFilename("output", "png", "svg")
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"png", "svg"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// inspectSnapshot looks at a snapshot and around it.
func inspectSnapshot(s *snapshot.Snapshot) (*snapshotInfo, error) {
	all, err := snapshot.List(s.Dir())
	if err != nil || len(all) != 1 {
		return nil, errors.Join(err, fmt.Errorf("snapshot %s was removed meanwhile", s.Dir()))
	}
	m := s.Manifest()
	info := &snapshotInfo{
		snapshotRow: describeSnapshot(all[0]), Ditto: m.Ditto, Compression: m.Compression, Holds: m.Holds,
		PagesBytes: m.Pages.Size, MapBytes: m.PageMap.Size,
		Sections: []snapshotSection{}, Layers: []snapshotLayer{}, Ancestors: []string{}, Dependents: []string{},
	}
	for _, x := range m.Sections {
		info.Sections = append(info.Sections, snapshotSection{x.Name, x.Version, x.Size})
	}
	for a := s.Parent(); a != nil; a = a.Parent() {
		info.Ancestors = append(info.Ancestors, a.Dir())
	}
	named := namedBytes(s)
	for i, l := range m.Layers {
		info.Layers = append(info.Layers, describeSnapshotLayer(s.Dir(), l, named[i]))
	}
	around, err := snapshot.List(filepath.Dir(s.Dir()))
	for _, d := range snapshot.Dependents(around, s.ID()) {
		info.Dependents = append(info.Dependents, d.Path)
	}
	return info, err
}

// namedBytes returns how much of memory each layer names.
func namedBytes(s *snapshot.Snapshot) []uint64 {
	named := make([]uint64, len(s.Manifest().Layers))
	for _, r := range s.Runs() {
		if r.Kind == snapshot.Block {
			named[r.Layer] += r.Pages * pageBytes
		}
	}
	return named
}

func describeSnapshotLayer(dir string, l snapshot.Layer, named uint64) snapshotLayer {
	path, _ := snapshot.FindLayer(dir, l)
	out := snapshotLayer{Path: path, ID: l.ID.String(), Format: l.Format, SizeBytes: l.Size, NamedBytes: named}
	f, err := snapshot.OpenLayer(dir, l)
	if err != nil {
		out.State, out.Error = "unusable", oneLine(err)
		if errors.Is(err, os.ErrNotExist) {
			out.State = "missing"
		}
		return out
	}
	stamp, err := f.Stamp()
	switch {
	case err != nil:
		out.State, out.Error = "unusable", oneLine(err)
	case f.Size() != l.Size:
		out.State = "changed"
	case snapshot.Stamp(stamp) == l.Stamp:
		out.State = "unchanged"
	default:
		out.State = "touched"
	}
	if err := f.Close(); err != nil {
		out.Error = oneLine(err)
	}
	return out
}

// printSnapshot lays out what a snapshot holds.
func (e *Env) printSnapshot(s *snapshotInfo) error {
	bar := 0
	if isTerminal(e.Stdout) {
		bar = 30
	}
	var out strings.Builder
	fmt.Fprintf(&out, "%s: %s of memory, %s stored\n\n", s.Path, humanBytes(s.MemoryBytes), humanBytes(s.StoredBytes))
	s.content().write(&out, bar)
	out.WriteString("\n")
	fmt.Fprintf(&out, "machine     %s\n", orDash(s.Machine))
	fmt.Fprintf(&out, "created     %s, by ditto %s\n", s.Created.Local().Format(time.DateTime), s.Ditto)
	fmt.Fprintf(&out, "identity    %s\n", s.ID)
	fmt.Fprintf(&out, "files       pages %s, compression %s; page map %s; %d sections\n", humanBytes(s.PagesBytes), s.Compression, humanBytes(s.MapBytes), len(s.Sections))
	fmt.Fprintf(&out, "ancestors   %s\n", orDash(strings.Join(s.Ancestors, ", ")))
	fmt.Fprintf(&out, "dependents  %s\n", orDash(strings.Join(s.Dependents, ", ")))
	if _, err := e.Stdout.Write([]byte(out.String())); err != nil || len(s.Layers) == 0 {
		return err
	}
	rows := [][]string{{"LAYER", "FORMAT", "DISK", "NAMES", "STATE"}}
	for _, l := range s.Layers {
		rows = append(rows, []string{l.Path, l.Format, humanBytes(uint64(l.SizeBytes)), humanBytes(l.NamedBytes), l.State})
	}
	if _, err := fmt.Fprintln(e.Stdout); err != nil {
		return err
	}
	return e.table(rows)
}

// content lists what pages equal. The rows add up to all of memory.
func (s *snapshotInfo) content() *grid {
	g := &grid{}
	row := func(what string, bytes uint64) {
		share := float64(bytes) / float64(max(s.MemoryBytes, 1))
		g.add(share, what, humanBytes(bytes), percent(share))
	}
	g.add(-1, "MEMORY", "BYTES", "SHARE")
	row("zeros", s.Holds.Zero)
	for _, l := range s.Layers {
		if l.NamedBytes > 0 {
			row("blocks of "+filepath.Base(l.Path), l.NamedBytes)
		}
	}
	row("equal to another page", s.Holds.Duplicate)
	if len(s.Ancestors) > 0 {
		row("pages of the parent", s.Holds.Parent)
	}
	row("unique", s.Holds.Unique)
	return g
}

// largest returns the indexes of the n largest values, in order.
func largest(values []uint64, n int) []int {
	order := make([]int, len(values))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int {
		switch {
		case values[a] > values[b]:
			return -1
		case values[a] < values[b]:
			return 1
		}
		return 0
	})
	order = order[:min(n, len(order))]
	slices.Sort(order)
	return order
}
