package cli

import (
	"github.com/spf13/cobra"

	"ditto.vm/internal/doctor"
	"ditto.vm/internal/netd"
)

func (e *Env) doctorCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Tell what this host can do, and how to make it do more",
		Long: `Look at this host: the kind of KVM and whether Linux runs on it, paging, large
pages, memory limits, ways to track written pages, networks, disks and the
sandbox. What is missing comes with its cure.

The exit code is 0 if Linux guests can run here.`,
		Example: `  ditto doctor
  ditto doctor --json | jq '.findings[] | select(.status != "ok")'`,
		GroupID:           groupHost,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(*cobra.Command, []string) error {
			report := doctor.ThisHost(netd.Find).Examine()
			if asJSON {
				if err := e.printJSON(report); err != nil {
					return err
				}
				return report.Err
			}
			rows := [][]string{{"AREA", "WHAT", "STATUS", "FOUND"}}
			for _, f := range report.Findings {
				rows = append(rows, []string{f.Area, f.Name, string(f.Status), f.Value})
				if f.Cure != "" {
					rows = append(rows, []string{"", "", "cure:", f.Cure})
				}
			}
			if err := e.table(rows); err != nil {
				return err
			}
			return report.Err
		},
	}
	addJSON(cmd, &asJSON)
	return cmd
}
