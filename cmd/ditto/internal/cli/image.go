package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/images/kernel"
	"ditto.vm/images/mkdisk"
	"ditto.vm/images/rootfs"
	"ditto.vm/images/uroot"
	"ditto.vm/vmm/config"
)

func (e *Env) imageCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "image",
		Short:   "Fetch, build and list what machines boot",
		GroupID: groupHost,
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(e.imageListCommand(), e.imageKernelCommand(), e.imageURootCommand(), e.imageDiskCommand(), e.imageRootfsCommand(), e.imageIndexCommand(),
		e.imageInfoCommand(), e.imageOverlayCommand(), e.imageConvertCommand(), e.imageCommitCommand(), e.imageRebaseCommand())
	return cmd
}

// imageKernel is a kernel as JSON.
type imageKernel struct {
	Version string `json:"version"`
	Flavour string `json:"flavour,omitempty"`
	Image   string `json:"image"`
	Modules string `json:"modules,omitempty"`
}

func asImageKernel(k kernel.Kernel) imageKernel {
	return imageKernel{k.Version, k.Flavour, k.Image, k.ModulesDir}
}

func (e *Env) imageListCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:               "ls",
		Short:             "List the cached kernels, newest first",
		Long:              "List the cached kernels, newest first. The first is what ditto run boots.",
		Example:           "  ditto image ls",
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(*cobra.Command, []string) error {
			kernels, err := kernel.NewStore("", nil).List()
			if err != nil {
				return err
			}
			out := []imageKernel{}
			rows := [][]string{{"KERNEL", "KIND", "PATH"}}
			for _, k := range kernels {
				out = append(out, asImageKernel(k))
				rows = append(rows, []string{k.Version, k.Flavour, k.Image})
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

func (e *Env) imageKernelCommand() *cobra.Command {
	var asJSON, fetch bool
	cmd := &cobra.Command{
		Use:   "kernel [SPEC]",
		Short: "Find a kernel, or fetch Debian's",
		Long: `Print the path of a kernel: the newest cached one that fits, or the newest of the
Debian archive, which is fetched and unpacked into the cache (~/.cache/ditto)
without installing it. SPEC is a version such as 6.12 or 6.1-cloud, or a path.`,
		Example: `  ditto image kernel
  ditto image kernel 6.1
  ditto image kernel 6.12-cloud --fetch`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: e.completeKernel,
		RunE: func(cmd *cobra.Command, args []string) error {
			progress := e.newProgress()
			defer progress.close()
			store, spec := kernel.NewStore("", progress), strings.Join(args, "")
			find := store.Ensure
			if fetch {
				find = store.Fetch
				if spec == "" {
					spec = kernel.DefaultSpec
				}
			}
			k, err := find(cmd.Context(), spec)
			if err != nil {
				return exit.New(exit.Kernel, err)
			}
			progress.close()
			if asJSON {
				return e.printJSON(asImageKernel(k))
			}
			_, err = fmt.Fprintln(e.Stdout, k.Image)
			return err
		},
	}
	addJSON(cmd, &asJSON)
	cmd.Flags().BoolVar(&fetch, "fetch", false, "fetch the newest even if an older one is cached")
	return cmd
}

func (e *Env) imageURootCommand() *cobra.Command {
	var asJSON bool
	var kernelSpec, runCommand string
	var files []string
	o := uroot.Options{}
	cmd := &cobra.Command{
		Use:   "u-root",
		Short: "Build an initramfs with u-root's commands",
		Long: `Build an initramfs with u-root's commands, the modules that the kernel needs in a
machine of ditto's, and an init that brings up console, disks and network. It is
cached; ditto run builds it when it is missing. Print its path.`,
		Example: `  ditto image u-root
  ditto image u-root --kernel 6.1
  ditto image u-root --command github.com/u-root/u-root/cmds/core/gosh --file bin/tool=./tool`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			progress := e.newProgress()
			defer progress.close()
			k, err := kernel.NewStore("", progress).Ensure(cmd.Context(), kernelSpec)
			if err != nil {
				return exit.New(exit.Kernel, err)
			}
			o.Kernel, o.Run, o.Progress = k, runCommand, progress
			if o.Files, err = guestFiles(files); err != nil {
				return err
			}
			image, err := e.uroot(cmd.Context(), o, func() error { return nil })
			if err != nil {
				return exit.New(exit.Kernel, err)
			}
			progress.close()
			if asJSON {
				return e.printJSON(image)
			}
			_, err = fmt.Fprintln(e.Stdout, image.Path)
			return err
		},
	}
	addJSON(cmd, &asJSON)
	fs := cmd.Flags()
	fs.StringVar(&kernelSpec, "kernel", "", "the kernel whose modules to pack; default the newest cached")
	fs.StringSliceVar(&o.Commands, "command", nil, "import path of a command to pack instead of the usual ones; repeat for more")
	fs.StringSliceVar(&o.Modules, "module", nil, "a kernel module to pack and load besides the usual ones; repeat for more")
	fs.StringArrayVar(&files, "file", nil, "`GUEST=HOST`: a file to pack; repeat for more")
	fs.StringVar(&runCommand, "run", "", "a command that the image runs at boot")
	_ = cmd.RegisterFlagCompletionFunc("kernel", e.completeKernel)
	return cmd
}

// guestFiles reads GUEST=HOST pairs.
func guestFiles(pairs []string) (map[string]string, error) {
	files := map[string]string{}
	for _, pair := range pairs {
		inside, outside, found := strings.Cut(pair, "=")
		if !found || inside == "" || outside == "" {
			return nil, exit.Errorf(exit.Usage, "--file %q: write GUEST=HOST, as in bin/tool=./tool", pair)
		}
		path, err := filepath.Abs(outside)
		if err != nil {
			return nil, err
		}
		files[strings.TrimPrefix(inside, "/")] = path
	}
	return files, nil
}

func (e *Env) imageDiskCommand() *cobra.Command {
	var asJSON bool
	var sizeText, format string
	var o mkdisk.Options
	cmd := &cobra.Command{
		Use:   "disk FILE [FOLDER]",
		Short: "Make a disk image, empty or from a folder",
		Long: `Make a raw disk image: with a folder, an ext4 file system that holds its content;
without one, an empty disk of the size given. Images are sparse.`,
		Example: `  ditto image disk data.img --size 10G
  ditto image disk site.img ./public
  ditto image disk work.img ./tree --size 4G --label work`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Path, o.Format = args[0], mkdisk.Format(format)
			if len(args) == 2 {
				o.Folder = args[1]
			}
			if sizeText != "" {
				size, err := config.ParseBytes(sizeText)
				if err != nil {
					return exit.Errorf(exit.Usage, "--size: %w", err)
				}
				o.SizeBytes = int64(size)
			}
			d, err := mkdisk.Make(cmd.Context(), o)
			if err != nil {
				return exit.New(exit.Disk, err)
			}
			if asJSON {
				return e.printJSON(d)
			}
			_, err = fmt.Fprintf(e.Stdout, "%s: %s, %s, %s on this disk\n", d.Path, d.Format, humanBytes(uint64(d.SizeBytes)), humanBytes(uint64(d.AllocatedBytes)))
			return err
		},
	}
	addJSON(cmd, &asJSON)
	fs := cmd.Flags()
	fs.StringVar(&sizeText, "size", "", "size of the disk, with a unit; default what the folder needs")
	fs.StringVar(&format, "format", "", "raw or ext4; default ext4 with a folder, raw without")
	fs.StringVar(&o.Label, "label", "", "label of the file system")
	fs.BoolVar(&o.Overwrite, "force", false, "replace an existing file")
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"raw", "ext4"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (e *Env) imageRootfsCommand() *cobra.Command {
	var asJSON bool
	var sizeText, out string
	var o rootfs.Options
	cmd := &cobra.Command{
		Use:   "rootfs FILE",
		Short: "Make a disk with a Debian root file system",
		Long: `Make a disk with a Debian root file system: systemd, DHCP, a login prompt on the
console. It needs root and mmdebstrap. The result is cached and copied to FILE.`,
		Example: `  sudo ditto image rootfs debian.img
  sudo ditto image rootfs debian.img --package fio,iperf3 --autologin
  ditto run --disk debian.img --append root=LABEL=rootfs`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			out = args[0]
			if _, err := os.Lstat(out); !errors.Is(err, os.ErrNotExist) {
				return exit.Errorf(exit.Disk, "%s exists already: remove it, or name another file", out)
			}
			if sizeText != "" {
				size, err := config.ParseBytes(sizeText)
				if err != nil {
					return exit.Errorf(exit.Usage, "--size: %w", err)
				}
				o.SizeBytes = int64(size)
			}
			progress := e.newProgress()
			defer progress.close()
			o.Progress = progress
			image, err := rootfs.Debian(cmd.Context(), o)
			if err != nil {
				return exit.New(exit.Disk, err)
			}
			progress.close()
			if err := copySparse(image.Path, out); err != nil {
				return exit.New(exit.Disk, err)
			}
			image.Path = out
			if asJSON {
				return e.printJSON(image)
			}
			_, err = fmt.Fprintf(e.Stdout, "%s: %s, label %s\n", out, humanBytes(uint64(image.SizeBytes)), image.Label)
			return err
		},
	}
	addJSON(cmd, &asJSON)
	fs := cmd.Flags()
	fs.StringVar(&sizeText, "size", "", "size of the disk, with a unit; default what it needs and 512M")
	fs.StringSliceVar(&o.Packages, "package", nil, "a package to install; repeat for more")
	fs.StringVar(&o.Kernel, "kernel-package", "", "a kernel package to install, for booting from the disk alone")
	fs.StringVar(&o.Hostname, "hostname", "", "the guest's name")
	fs.BoolVar(&o.Autologin, "autologin", false, "log root in on the console without a prompt")
	return cmd
}
