package cli

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/images/chain"
)

// imageLayer is one image of a chain as JSON, the top first.
type imageLayer struct {
	Path         string       `json:"path"`
	Format       chain.Format `json:"format"`
	SizeBytes    int64        `json:"size_bytes"`
	FileBytes    int64        `json:"file_bytes"`
	ClusterBytes int64        `json:"cluster_bytes,omitempty"`
	Version      int          `json:"version,omitempty"`
	Compression  string       `json:"compression,omitempty"`
	Dirty        bool         `json:"dirty,omitempty"`
	Corrupt      bool         `json:"corrupt,omitempty"`
	Snapshots    int          `json:"snapshots,omitempty"`
}

func describeLayer(l *chain.Layer) (imageLayer, error) {
	length, err := l.File().Length()
	if err != nil {
		return imageLayer{}, err
	}
	out := imageLayer{Path: l.Path(), Format: l.Format(), SizeBytes: l.Size(), FileBytes: length}
	if h, ok := l.Header(); ok {
		out.ClusterBytes, out.Version, out.Compression = h.ClusterSize(), h.Version, h.Compression.String()
		out.Dirty, out.Corrupt, out.Snapshots = h.Dirty, h.Corrupt, h.Snapshots
	}
	return out, nil
}

// state says in a word what is special about the layer.
func (l imageLayer) state() string {
	switch {
	case l.Corrupt:
		return "corrupt"
	case l.Dirty:
		return "not closed properly"
	case l.Snapshots > 0:
		return fmt.Sprintf("%d internal snapshots", l.Snapshots)
	}
	return "-"
}

func (e *Env) imageInfoCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "info FILE",
		Short: "Show a disk image and what it is stacked on",
		Long: `Show the images that make up a disk, the top first: format, size of the disk, length
of the file. 'qemu-img check' looks into a qcow2 image itself.`,
		Example: `  ditto image info disk.qcow2
  ditto image info --json disk.qcow2 | jq .[].path`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			c, err := chain.Open(args[0], chain.Options{ReadOnly: true})
			if err != nil {
				return exit.New(exit.Disk, err)
			}
			defer func() { _ = c.Close() }() // it was only read
			var out []imageLayer
			rows := [][]string{{"PATH", "FORMAT", "DISK", "FILE", "CLUSTER", "STATE"}}
			for _, l := range c.Layers() {
				d, err := describeLayer(l)
				if err != nil {
					return exit.New(exit.Disk, err)
				}
				out = append(out, d)
				cluster := "-"
				if d.ClusterBytes > 0 {
					cluster = humanBytes(uint64(d.ClusterBytes))
				}
				rows = append(rows, []string{d.Path, string(d.Format), humanBytes(uint64(d.SizeBytes)), humanBytes(uint64(d.FileBytes)), cluster, d.state()})
			}
			if asJSON {
				return e.printJSON(out)
			}
			return e.table(rows)
		},
	}
	addJSON(cmd, &asJSON)
	return cmd
}

func (e *Env) imageConvertCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "convert FILE NEW",
		Short: "Copy a disk into one image of its own",
		Long: `Copy what a disk reads as, with everything it is stacked on, into a new image that
stands alone. Zeros take no space. For compression, encryption and other formats
use 'qemu-img convert'.`,
		Example: `  ditto image convert overlay.qcow2 flat.qcow2
  ditto image convert --format raw disk.qcow2 disk.img`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := chain.Open(args[0], chain.Options{ReadOnly: true})
			if err != nil {
				return exit.New(exit.Disk, err)
			}
			defer func() { _ = c.Close() }() // it was only read
			progress := e.newProgress()
			defer progress.close()
			what := "convert " + filepath.Base(args[0])
			err = chain.Convert(cmd.Context(), c, args[1], chain.Format(format), func(done int64) {
				if isTerminal(e.Stderr) {
					progress.Report(what, float64(done)/float64(c.Size()))
				}
			})
			if err != nil {
				return exit.New(exit.Disk, err)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&format, "format", string(chain.Qcow2), "raw or qcow2")
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"raw", "qcow2"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (e *Env) imageOverlayCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "overlay NEW FILE",
		Short: "Make an empty overlay of a disk image",
		Long: `Make an empty qcow2 image that is stacked on another: it reads as that one, and
keeps what is written to it. The image below must not be written from then on.
To put an overlay on another image use 'ditto image rebase'.`,
		Example: `  ditto image overlay web1.qcow2 base.img
  ditto run --disk web1.qcow2`,
		Args: cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			c, err := chain.Open(args[1], chain.Options{ReadOnly: true})
			if err != nil {
				return exit.New(exit.Disk, err)
			}
			defer func() { _ = c.Close() }() // it was only read
			if err := c.CreateOverlay(args[0]); err != nil {
				return exit.New(exit.Disk, err)
			}
			_, err = fmt.Fprintf(e.Stdout, "%s: %s on %s\n", args[0], humanBytes(uint64(c.Size())), args[1])
			return err
		},
	}
}

func (e *Env) imageRebaseCommand() *cobra.Command {
	var alone, unsafe bool
	var format string
	cmd := &cobra.Command{
		Use:   "rebase FILE [BELOW]",
		Short: "Stack an overlay on another image",
		Long: `Stack an overlay on another image, or with --alone on none. The disk reads as before:
what the two images differ in is copied to the overlay. With --unsafe only the name
of the image below is changed, which is right after it was moved, and need not be
there. No machine may use the overlay.

The format of the image below is found by its content. Say it with --format if a
guest may have written what it holds: it can make a raw disk look like another.`,
		Example: `  ditto image rebase web1.qcow2 base-v2.img
  ditto image rebase --alone web1.qcow2
  ditto image rebase --unsafe --format raw web1.qcow2 /srv/images/base.img`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if alone == (len(args) == 2) {
				return exit.Errorf(exit.Usage, "name the image to stack %s on, or say --alone", args[0])
			}
			below := ""
			if !alone {
				below = args[1]
			}
			progress := e.newProgress()
			defer progress.close()
			what := "rebase " + filepath.Base(args[0])
			o := chain.RebaseOptions{Format: chain.Format(format), Unsafe: unsafe, Progress: func(done, total int64) {
				if isTerminal(e.Stderr) {
					progress.Report(what, float64(done)/float64(total))
				}
			}}
			if err := chain.Rebase(cmd.Context(), args[0], below, o); err != nil {
				return exit.New(exit.Disk, err)
			}
			progress.close()
			if alone {
				below = "nothing"
			}
			_, err := fmt.Fprintf(e.Stdout, "%s is stacked on %s\n", args[0], below)
			return err
		},
	}
	cmd.Flags().BoolVar(&alone, "alone", false, "stack it on no image")
	cmd.Flags().BoolVar(&unsafe, "unsafe", false, "change the name of the image below and nothing else")
	cmd.Flags().StringVar(&format, "format", "", "format of the image below, raw or qcow2; default what its content says")
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"raw", "qcow2"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (e *Env) imageCommitCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "commit FILE",
		Short: "Merge an overlay into the image below it",
		Long: `Write what an overlay holds to the image it is stacked on. Other overlays of that
image are of no use afterwards. The overlay itself stays and may be removed. No
machine may use either.`,
		Example: `  ditto image commit web1.qcow2`,
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			below, err := chain.Commit(args[0])
			if err != nil {
				return exit.New(exit.Disk, err)
			}
			_, err = fmt.Fprintf(e.Stdout, "%s holds what %s held\n", below, args[0])
			return err
		},
	}
}
