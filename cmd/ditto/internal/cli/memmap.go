package cli

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/internal/memmap"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/registry"
)

func (e *Env) memmapCommand() *cobra.Command {
	var output, format string
	var look lookFlags
	cmd := &cobra.Command{
		Use:   "memmap NAME -o FILE",
		Short: "Draw a picture of a machine's memory",
		Long: `Draw what each page of a machine's memory equals, by colour: zeros, blocks of which
disk, another page, nothing known; and which 2 MiB the host maps as one, by a
border around them. Up to 4 GiB each page is a dot, above that each 2 MiB is a
tile that is coloured in proportion.

FILE ends in .png or .svg; - is standard output. All of memory is read, while the
machine runs on; --exact pauses it meanwhile, --quick does not read memory.`,
		Example: `  ditto memmap web -o web.png
  ditto memmap web --exact -o web.svg
  ditto memmap web -o - | display`,
		GroupID:           groupMachines,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: e.completeOne,
		RunE: func(cmd *cobra.Command, args []string) error {
			draw, err := e.drawing(output, format)
			if err != nil {
				return exit.New(exit.Usage, err)
			}
			return e.forEach(cmd.Context(), args, func(ctx context.Context, _ *registry.Registry, vm registry.VM, remote *api.Remote) error {
				ctx, cancel := look.bound(ctx)
				defer cancel()
				answer, err := remote.MemoryMap(ctx, look.query())
				if err != nil {
					return lookError(err, vm.Name)
				}
				var picture bytes.Buffer
				if err := draw(asPicture(vm.Name, answer, time.Now()), &picture); err != nil {
					return fmt.Errorf("%s: %w", vm.Name, err)
				}
				return e.putPicture(output, picture.Bytes())
			})
		},
	}
	look.add(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "", "the picture: FILE.png, FILE.svg, or - for standard output")
	cmd.Flags().StringVar(&format, "format", "", "png or svg; default what FILE ends in, or png")
	_ = cmd.MarkFlagRequired("output")
	_ = cmd.MarkFlagFilename("output", "png", "svg")
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"png", "svg"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.MarkFlagsMutuallyExclusive("quick", "exact")
	return cmd
}

// drawing returns what draws in the format that is asked for, after checking that
// the picture can be put there.
func (e *Env) drawing(output, format string) (func(*memmap.Map, io.Writer) error, error) {
	if output == "-" {
		if isTerminal(e.Stdout) {
			return nil, errors.New("a picture would garble the terminal: name a file, as in -o map.png, or redirect the output")
		}
	} else if st, err := os.Stat(output); err == nil && !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file: name one that ends in .png or .svg", output)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	switch {
	case format == "" && output == "-":
		format = "png"
	case format == "":
		format = strings.ToLower(strings.TrimPrefix(filepath.Ext(output), "."))
	}
	switch format {
	case "png":
		return (*memmap.Map).PNG, nil
	case "svg":
		return (*memmap.Map).SVG, nil
	}
	return nil, fmt.Errorf("%s: pictures end in .png or .svg, or name the --format", output)
}

// putPicture puts a finished picture where it was asked for: a file appears
// whole or not at all.
func (e *Env) putPicture(output string, picture []byte) error {
	if output == "-" {
		_, err := e.Stdout.Write(picture)
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(output), filepath.Base(output)+".tmp-*")
	if err != nil {
		return fmt.Errorf("picture: %w", err)
	}
	_, err = tmp.Write(picture)
	err = errors.Join(err, tmp.Chmod(0o644), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), output)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("picture: %w", err), os.Remove(tmp.Name()))
	}
	_, err = fmt.Fprintf(e.Stdout, "%s: %s\n", output, humanBytes(uint64(len(picture))))
	return err
}

// asPicture turns a machine's answer into what is drawn. Drawing checks it.
func asPicture(name string, m api.MemoryMap, now time.Time) *memmap.Map {
	out := &memmap.Map{
		Name: name, CellBytes: m.CellBytes, Pages: m.Pages,
		Notes: []string{now.Format(time.DateTime) + ", " + provenance(m.Mode, m.Exact)},
	}
	for _, r := range m.Regions {
		out.Regions = append(out.Regions, memmap.Region{Start: r.Start, Bytes: r.Bytes})
	}
	for _, c := range m.Classes {
		out.Classes = append(out.Classes, memmap.Class{Kind: memmap.Kind(c.Kind), Title: c.Title, Bytes: c.Bytes})
	}
	for i := 0; i+1 < len(m.Counts); i += 2 {
		out.Counts = append(out.Counts, binary.LittleEndian.Uint16(m.Counts[i:]))
	}
	for _, f := range m.Frames {
		out.Frames = append(out.Frames, memmap.Frame(f))
	}
	return out
}
