package cli

import "github.com/spf13/cobra"

func (e *Env) snapshotCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "snapshot",
		Short:   "Save running machines",
		GroupID: groupMachines,
	}
	return cmd
}
