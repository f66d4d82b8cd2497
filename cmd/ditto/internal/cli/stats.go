package cli

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ditto.vm/vmm/api"
)

func (e *Env) statsCommand() *cobra.Command {
	var asJSON, prometheus bool
	cmd := &cobra.Command{
		Use:   "stats NAME",
		Short: "Show a machine's counters",
		Long: `Show what a machine has counted since it was started: exits to the VMM by reason,
how KVM and the host map its memory, what it costs the host, how pages were named,
and what its devices did.`,
		Example: `  ditto stats web
  ditto stats web --json | jq .exits
  ditto stats web --prometheus`,
		GroupID:           groupMachines,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: e.completeOne,
		RunE: func(cmd *cobra.Command, args []string) error {
			_, _, remote, err := e.dial(args[0])
			if err != nil {
				return err
			}
			defer remote.Close()
			ctx, cancel := context.WithTimeout(cmd.Context(), answerTimeout)
			defer cancel()
			if prometheus {
				text, err := remote.Metrics(ctx)
				if err != nil {
					return err
				}
				_, err = fmt.Fprint(e.Stdout, text)
				return err
			}
			stats, err := remote.Stats(ctx)
			if err != nil {
				return err
			}
			if asJSON {
				return e.printJSON(stats)
			}
			return e.table(statsRows(stats))
		},
	}
	addJSON(cmd, &asJSON)
	cmd.Flags().BoolVar(&prometheus, "prometheus", false, "print the Prometheus text format")
	cmd.MarkFlagsMutuallyExclusive("json", "prometheus")
	return cmd
}

// statsRows lays the counters out in two columns.
func statsRows(s api.Stats) [][]string {
	rows := [][]string{
		{"uptime", humanDuration(time.Duration(s.UptimeMs) * time.Millisecond)},
		{"resident", humanBytes(s.ResidentBytes)},
		{"guest RAM resident", fmt.Sprintf("%s, %s with its share of what others have too", humanBytes(s.GuestResidentBytes), humanBytes(s.GuestPSSBytes))},
		{"own anonymous memory", humanBytes(s.AnonymousBytes)},
		{"pages mapped", fmt.Sprintf("%d of 4K, %d of 2M, %d of 1G (%s with large entries)", s.Pages4K, s.Pages2M, s.Pages1G, largeShare(s))},
	}
	if r := s.Restore; r != nil {
		rows = append(rows, []string{"restored", fmt.Sprintf("%s: %s mapped, %s copied, %s still missing, %d faults",
			r.Mode, humanBytes(r.MappedBytes), humanBytes(r.CopiedBytes), humanBytes(r.MissingBytes), r.Faults)})
	}
	rows = append(rows, []string{"tracker", s.Tracker}, []string{"host frames", framesText(s.Frames)})
	rows = append(rows, countedOnly("small frames ", s.Frames.Reasons)...)
	if s.Names.Enabled {
		named := maps.Clone(s.Names.Counters)
		rows = append(rows, []string{"names", fmt.Sprintf("%d pages, %d of them proven", named["named"], named["named_proven"])})
		delete(named, "named")
		delete(named, "named_proven")
		rows = append(rows, countedOnly("names ", named)...)
	} else {
		rows = append(rows, []string{"names", "off"})
	}
	rows = append(rows, counterRows("exits ", s.Exits)...)
	for _, d := range s.Devices {
		rows = append(rows, counterRows(d.Name+" ", d.Counters)...)
	}
	return rows
}

// largeShare is the part of the mapped memory behind entries larger than 4 KiB.
func largeShare(s api.Stats) string {
	large := s.Pages2M*512 + s.Pages1G*512*512
	if large+s.Pages4K == 0 {
		return "none mapped"
	}
	return fmt.Sprintf("%.1f %%", 100*float64(large)/float64(large+s.Pages4K))
}

// framesText says how the host maps the guest's memory.
func framesText(f api.MemoryFrames) string {
	if f.Total == 0 {
		return "not counted"
	}
	return fmt.Sprintf("%d large, %d small, %d empty of %d", f.Large, f.Small, f.Empty, f.Total)
}

// countedOnly is counterRows without what was not counted.
func countedOnly(prefix string, counters map[string]uint64) [][]string {
	counted := maps.Clone(counters)
	maps.DeleteFunc(counted, func(_ string, n uint64) bool { return n == 0 })
	return counterRows(prefix, counted)
}

// counterRows sorts counters by name.
func counterRows(prefix string, counters map[string]uint64) [][]string {
	var rows [][]string
	for _, name := range slices.Sorted(maps.Keys(counters)) {
		value := fmt.Sprint(counters[name])
		if strings.HasSuffix(name, "bytes") {
			value = humanBytes(counters[name])
		}
		rows = append(rows, []string{prefix + name, value})
	}
	return rows
}
