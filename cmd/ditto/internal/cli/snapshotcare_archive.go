package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/migration/snapshot"
	"ditto.vm/migration/snapshot/archive"
	"ditto.vm/vmm/config"
)

func (e *Env) snapshotExportCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "export DIR FILE",
		Short: "Pack a snapshot into one file, for another host",
		Long: `Pack a snapshot, its ancestors and the disks that they need into one file, so that it
restores on another host. Everything is verified before. FILE must not exist; - is
standard output. The file is a compressed tar: 'tar --zstd -tf FILE' lists it.`,
		Example: `  ditto snapshot export /var/snap/web1 web1.ditto
  ditto snapshot export /var/snap/web1 - | ssh other ditto snapshot import - /var/snap/web1`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: completeExport,
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[1] == "-" && (asJSON || isTerminal(e.Stdout)) {
				return exit.Errorf(exit.Usage, "an archive cannot go where text goes: name a file, or redirect the output")
			}
			if err := hasDisks(args[0]); err != nil {
				return snapshotError(err)
			}
			progress := e.newProgress()
			defer progress.close()
			o := archive.Options{Ditto: e.Version.Version, Progress: e.shares(progress, filepath.Base(args[0]))}
			report, err := e.export(cmd.Context(), args[0], args[1], o)
			progress.close()
			switch {
			case err != nil:
				return archiveError(err)
			case args[1] == "-":
				return nil
			case asJSON:
				return e.printJSON(report)
			}
			_, err = fmt.Fprintf(e.Stdout, "%s: %s, %d snapshots and %d images of %s\n", args[1],
				humanBytes(report.Stored), len(report.Snapshots), report.Images, humanBytes(report.Bytes))
			return err
		},
	}
	addJSON(cmd, &asJSON)
	return cmd
}

// completeExport completes a snapshot and then a file.
func completeExport(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	switch len(args) {
	case 0:
		return completeSnapshots(cmd, args, word)
	case 1:
		return nil, cobra.ShellCompDirectiveDefault
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

func (e *Env) export(ctx context.Context, dir, file string, o archive.Options) (archive.Report, error) {
	if file == "-" {
		return archive.Export(ctx, dir, e.Stdout, o)
	}
	return archive.ExportFile(ctx, dir, file, o)
}

// hasDisks makes sure that the disks of a snapshot's machine are among its layers
// and there, without which an archive would not hold them.
func hasDisks(dir string) (err error) {
	s, err := snapshot.Open(dir, snapshot.OpenOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	c, err := config.Parse(s.Manifest().Config)
	if err != nil {
		return fmt.Errorf("snapshot %s: its configuration: %w", dir, err)
	}
	for _, d := range c.Disks {
		_, l, ok := s.Locate(d.Path)
		if !ok {
			return fmt.Errorf("snapshot %s: the disk %s of its machine is not among its layers: copy both by hand", dir, d.Path)
		}
		f, err := snapshot.OpenLayer(s.Dir(), l)
		if err != nil {
			return fmt.Errorf("snapshot %s: %w: %w", dir, snapshot.ErrLayer, err)
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	return nil
}

// archiveError gives err the exit code of a bad snapshot, and a cure.
func archiveError(err error) error {
	cure := ""
	switch {
	case errors.Is(err, archive.ErrFormat):
		cure = "check how it was copied"
	case errors.Is(err, snapshot.ErrExists):
		cure = "remove it, or name another"
	case errors.Is(err, snapshot.ErrNoSpace):
		cure = "free some, or use another file system"
	default:
		return snapshotError(err)
	}
	return exit.New(exit.Snapshot, fmt.Errorf("%w: %s", err, cure))
}

func (e *Env) snapshotImportCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "import FILE DIR",
		Short: "Unpack a snapshot from another host",
		Long: `Unpack what 'ditto snapshot export' packed into a new folder: a folder for the
snapshot, one for each of its ancestors, and the disks in 'layers'. Keep them
together. Everything is verified; the folder appears when it is complete.

FILE may be - for standard input.`,
		Example: `  ditto snapshot import web1.ditto /var/snap/web
  ditto restore /var/snap/web/web1`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			in := io.Reader(e.Stdin)
			if args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return exit.New(exit.Snapshot, err)
				}
				defer func() { _ = f.Close() }() // it was only read
				in = f
			}
			progress := e.newProgress()
			defer progress.close()
			report, err := archive.Import(cmd.Context(), in, args[1], archive.Options{Progress: e.shares(progress, filepath.Base(args[1]))})
			progress.close()
			if err != nil {
				return archiveError(err)
			}
			if asJSON {
				return e.printJSON(report)
			}
			_, err = fmt.Fprintf(e.Stdout, "%s: intact; 'ditto restore' lets it go on\n", report.Snapshots[0])
			return err
		},
	}
	addJSON(cmd, &asJSON)
	return cmd
}
