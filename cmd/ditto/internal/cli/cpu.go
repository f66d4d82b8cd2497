package cli

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/vmm"
)

func (e *Env) cpuCommand() *cobra.Command {
	var o cpuOutput
	var baseline bool
	cmd := &cobra.Command{
		Use:   "cpu",
		Short: "Show the CPU that guests have, and make CPUs that fit several hosts",
		Long: `Show the CPU that guests of this host have: its vendor and its features, named as
in /proc/cpuinfo.

A guest can be restored and migrated to hosts whose CPU is of the same vendor and
has all features that the guest was started with. Write the CPU of each host to a
file, make one of what they have in common, and start guests with it.`,
		Example: `  ditto cpu
  ditto cpu --baseline --json
  ditto cpu -o hosta.yaml
  ditto cpu common hosta.yaml hostb.yaml -o both.yaml
  ditto cpu check both.yaml && ditto run --cpu both.yaml`,
		GroupID:           groupHost,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(*cobra.Command, []string) error {
			m, err := vmm.HostCPU()
			if err != nil {
				return err
			}
			if baseline {
				m = vmm.BaselineCPU(m)
			}
			return e.showCPU(m, o)
		},
	}
	o.add(cmd)
	cmd.Flags().BoolVar(&baseline, "baseline", false, "what --cpu baseline is here")
	cmd.AddCommand(e.cpuCommonCommand(), e.cpuCheckCommand())
	return cmd
}

// cpuOutput are the flags that say where a CPU model goes.
type cpuOutput struct {
	path   string
	asJSON bool
}

func (o *cpuOutput) add(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&o.path, "output", "o", "", "write it to a `FILE` that does not exist yet, JSON if its name ends in .json and YAML otherwise")
	_ = cmd.MarkFlagFilename("output", "yaml", "json")
	addJSON(cmd, &o.asJSON)
	cmd.MarkFlagsMutuallyExclusive("output", "json")
}

// showCPU prints a model, or writes it to a file.
func (e *Env) showCPU(m vmm.CPUModel, o cpuOutput) error {
	switch {
	case o.path != "":
		return writeCPU(m, o.path)
	case o.asJSON:
		return e.printJSON(m)
	}
	rows := [][]string{{"VENDOR", m.Vendor}}
	const width = 8 // features a line
	for i := 0; i < len(m.Features); i += width {
		title := ""
		if i == 0 {
			title = "FEATURES"
		}
		rows = append(rows, []string{title, strings.Join(m.Features[i:min(i+width, len(m.Features))], " ")})
	}
	return e.table(rows)
}

// writeCPU writes a model to a new file.
func writeCPU(m vmm.CPUModel, path string) error {
	data, err := m.Encode(path)
	if err != nil {
		return err
	}
	const mode = 0o644 // it is for other hosts
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if errors.Is(err, os.ErrExist) {
		return exit.Errorf(exit.Usage, "%s exists: remove it yourself, or use another name", path)
	}
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// loadCPU reads a model; one that cannot be read is a wrong argument.
func loadCPU(path string) (vmm.CPUModel, error) {
	m, err := vmm.LoadCPUModel(path)
	return m, exit.New(exit.Usage, err)
}

func (e *Env) cpuCommonCommand() *cobra.Command {
	var o cpuOutput
	cmd := &cobra.Command{
		Use:     "common FILE...",
		Short:   "Make a CPU that several hosts can run",
		Long:    "Make a CPU of the features that all of the given ones have. All must be of one\nvendor: a guest cannot go to another.",
		Example: "  ditto cpu common hosta.yaml hostb.yaml hostc.json -o all.yaml",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			models := make([]vmm.CPUModel, 0, len(args))
			for _, path := range args {
				m, err := loadCPU(path)
				if err != nil {
					return err
				}
				models = append(models, m)
			}
			m, err := vmm.CommonCPU(models...)
			if err != nil {
				return err
			}
			return e.showCPU(m, o)
		},
	}
	o.add(cmd)
	return cmd
}

func (e *Env) cpuCheckCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "check FILE",
		Short:   "Tell whether this host can run guests of a CPU",
		Long:    "Tell whether guests started with --cpu FILE can run here, and which features are\nmissing if not. The exit code is 0 if they can.",
		Example: "  ditto cpu check both.yaml",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			m, err := loadCPU(args[0])
			if err != nil {
				return err
			}
			host, err := vmm.HostCPU()
			if err != nil {
				return err
			}
			if err := m.Missing(host); err != nil {
				return fmt.Errorf("%s: %w: 'ditto cpu common' makes one that this host can run too", args[0], err)
			}
			_, err = fmt.Fprintf(e.Stdout, "%s: this host runs its guests (%s, %d features)\n", args[0], m.Vendor, len(m.Features))
			return err
		},
	}
}
