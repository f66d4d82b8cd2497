package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/registry"
)

func (e *Env) diskCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "disk",
		Short:   "Change the disks of a running machine",
		GroupID: groupMachines,
	}
	cmd.AddCommand(e.diskResizeCommand())
	return cmd
}

func (e *Env) diskResizeCommand() *cobra.Command {
	var shrink bool
	cmd := &cobra.Command{
		Use:   "resize NAME DISK SIZE",
		Short: "Make a disk and its image larger or smaller",
		Long: `Make a disk of a running machine larger or smaller, and its image with it. DISK is
its number, 0 for the first, or its name in stats, blk0. The guest is told; its
partitions and file systems are its own to change. A block device is made larger
before. What lies behind the end of a smaller disk is lost.`,
		Example: `  ditto disk resize web 0 16G
  ditto disk resize web blk1 512M --shrink`,
		Args:              cobra.ExactArgs(3),
		ValidArgsFunction: e.completeOne,
		RunE: func(cmd *cobra.Command, args []string) error {
			size, err := config.ParseBytes(args[2])
			if err != nil {
				return exit.New(exit.Usage, err)
			}
			n, err := parseDiskNumber(args[1])
			if err != nil {
				return exit.New(exit.Usage, err)
			}
			return e.forEach(cmd.Context(), args[:1], func(ctx context.Context, _ *registry.Registry, _ registry.VM, remote *api.Remote) error {
				ctx, cancel := context.WithTimeout(ctx, answerTimeout)
				defer cancel()
				return resizeDisk(ctx, remote, n, size, shrink)
			})
		},
	}
	cmd.Flags().BoolVar(&shrink, "shrink", false, "let a disk become smaller, and lose its end")
	return cmd
}

// parseDiskNumber reads which disk is meant.
func parseDiskNumber(s string) (int, error) {
	n, err := strconv.Atoi(strings.TrimPrefix(s, "blk"))
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%q is no disk: use 0 or blk0 for the first", s)
	}
	return n, nil
}

// resizeDisk changes a disk's size, and makes it smaller only if that was said.
func resizeDisk(ctx context.Context, remote *api.Remote, n int, size config.Bytes, shrink bool) error {
	if !shrink {
		stats, err := remote.Stats(ctx)
		if err != nil {
			return err
		}
		name := fmt.Sprintf("blk%d", n)
		for _, d := range stats.Devices {
			if has := config.Bytes(d.Counters["size_bytes"]); d.Name == name && size < has {
				return exit.Errorf(exit.Usage, "disk %s of %s would lose its end: say --shrink if that is meant", name, has)
			}
		}
	}
	return remote.ResizeDisk(ctx, n, uint64(size))
}
