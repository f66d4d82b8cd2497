package bench

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Markers between which the tables stand in a document. What is outside is
// written by hand.
const (
	MarkerBegin = "<!-- bench:begin (written by make bench; edit outside of the markers) -->"
	MarkerEnd   = "<!-- bench:end -->"
)

// errNoMarkers says that a document has no place for the tables.
var errNoMarkers = errors.New("the markers bench:begin and bench:end do not stand in it, once each and in this order")

// UpdateDocument writes the tables of r between the markers of a file, and figures
// beside it. Tables there of benchmarks that r does not have stay as they are.
func UpdateDocument(path string, r Report) error {
	old, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("tables: %w", err)
	}
	if err := writeFigures(path, r); err != nil {
		return err
	}
	text, err := replaceTables(string(old), r)
	if err != nil {
		return fmt.Errorf("tables: %s: %w", path, err)
	}
	if text == string(old) {
		return nil
	}
	return replaceFile(path, []byte(text))
}

func replaceTables(document string, r Report) (string, error) {
	if strings.Count(document, MarkerBegin) != 1 || strings.Count(document, MarkerEnd) != 1 {
		return "", errNoMarkers
	}
	before, rest, _ := strings.Cut(document, MarkerBegin)
	old, after, ok := strings.Cut(rest, MarkerEnd)
	if !ok {
		return "", errNoMarkers
	}
	all := merge(parseTables(old), tablesOf(r))
	return before + MarkerBegin + "\n\n" + format(all) + "\n" + MarkerEnd + after, nil
}

// tables are the Markdown of one benchmark: a row for each of its targets, and
// its section.
type tables struct{ name, rows, section string }

// Tables writes a report as Markdown: first where each target stands, then the
// values of each benchmark.
func Tables(r Report) string { return format(tablesOf(r)) }

const (
	targetsTitle = "## Where the targets stand\n\n"
	targetsHead  = "| benchmark | target | found: median (min to max) | |\n|---|---|---|---|\n"
	sectionMark  = "\n## "
)

func tablesOf(r Report) []tables {
	all := make([]tables, len(r.Results))
	for i := range r.Results {
		var rows, section strings.Builder
		writeTargets(&rows, &r.Results[i])
		writeResult(&section, &r.Results[i])
		all[i] = tables{r.Results[i].Name, rows.String(), section.String()}
	}
	return all
}

func format(all []tables) string {
	var out strings.Builder
	out.WriteString(targetsTitle + targetsHead)
	for _, t := range all {
		out.WriteString(t.rows)
	}
	for _, t := range all {
		out.WriteString(t.section)
	}
	return out.String()
}

// parseTables reads what format wrote.
func parseTables(text string) []tables {
	head, _, _ := strings.Cut(strings.TrimLeft(text, "\n"), "\n"+sectionMark[1:])
	rows := map[string]string{}
	for line := range strings.Lines(strings.TrimPrefix(strings.TrimPrefix(head, targetsTitle), targetsHead)) {
		if cells := strings.Split(line, " | "); len(cells) > 2 {
			name := strings.TrimPrefix(cells[0], "| ")
			rows[name] += strings.TrimRight(line, "\n") + "\n"
		}
	}
	var all []tables
	for _, section := range strings.Split(text, sectionMark)[1:] {
		name, _, _ := strings.Cut(section, "\n")
		if "## "+name+"\n\n" == targetsTitle {
			continue
		}
		all = append(all, tables{name, rows[name], sectionMark + strings.TrimRight(section, "\n") + "\n"})
	}
	return all
}

// merge puts the tables of fresh into those of old, in their places there or at
// the end.
func merge(old, fresh []tables) []tables {
	for _, t := range fresh {
		at := slices.IndexFunc(old, func(o tables) bool { return o.name == t.name })
		if at < 0 {
			old = append(old, t)
			continue
		}
		old[at] = t
	}
	return old
}

// writeTargets writes one row for each target of a result.
func writeTargets(out *strings.Builder, r *Result) {
	for _, v := range r.Targets {
		what, found, verdict := r.describe(v)
		if verdict == "missed" {
			verdict = "**missed**"
		}
		fmt.Fprintf(out, "| %s | %s | %s | %s |\n", r.Name, what, found, verdict)
	}
}

func writeResult(out *strings.Builder, r *Result) {
	fmt.Fprintf(out, "\n## %s\n\n%s.\n\n", r.Name, r.Title)
	fmt.Fprintf(out, "Measured %s, commit %s, in %s. Host: %s.\n\n",
		r.Started.Format("2006-01-02 15:04 MST"), r.Commit, r.Took.Round(time.Second), r.Host)
	if r.Skipped != "" {
		fmt.Fprintf(out, "**Not run.** %s\n", oneLine(r.Skipped))
		return
	}
	if r.Failed != "" {
		fmt.Fprintf(out, "**Ended early.** %s\n\n", oneLine(r.Failed))
	}
	if r.Rounds == 0 {
		return
	}
	rounds := fmt.Sprintf("%d rounds", r.Rounds)
	if r.Quick {
		rounds += " (a quick run)"
	}
	if r.Lost > 0 {
		rounds += fmt.Sprintf("; %d more in which a guest died in the emulated host were repeated", r.Lost)
	}
	fmt.Fprintf(out, "Medians (min to max) of %s.\n\n", rounds)
	if r.Figure != nil {
		fmt.Fprintf(out, "![%s](%s)\n\n", r.Figure.Title, figureFile(r.Name))
	}
	writeValues(out, r)
	out.WriteString("\n")
	for _, m := range r.Metrics {
		fmt.Fprintf(out, "- %s: %s\n", m.Name, m.What)
	}
	out.WriteString("\n```\n")
	for _, e := range r.Entries {
		fmt.Fprintf(out, "%-13s %s\n", e.Name, withoutFolders(e.Command))
	}
	out.WriteString("```\n")
}

// writeValues writes a table with a row for each metric and a column for each
// contestant, and the ratio of the first to each of the others.
func writeValues(out *strings.Builder, r *Result) {
	header, line := "| |", "|---|"
	for i, e := range r.Entries {
		header, line = header+" "+e.Name+" |", line+"---|"
		if i > 0 {
			header, line = header+" ratio |", line+"---|"
		}
	}
	out.WriteString(header + "\n" + line + "\n")
	for _, m := range r.Metrics {
		fmt.Fprintf(out, "| %s, %s |", m.Name, m.Unit)
		for i, e := range r.Entries {
			fmt.Fprintf(out, " %s |", formatSummary(e.Summary[m.Name]))
			if i > 0 {
				out.WriteString(formatRatio(Summarize(Ratios(r.Entries[0].Values[m.Name], e.Values[m.Name]))))
			}
		}
		out.WriteString("\n")
	}
}

// formatRatio is a cell with a ratio, empty when one side measured nothing.
func formatRatio(s Summary) string {
	if s.N == 0 {
		return " - |"
	}
	return fmt.Sprintf(" %.3f |", s.Median)
}

func formatSummary(s Summary) string {
	if s.N == 0 {
		return "-"
	}
	return fmt.Sprintf("%s (%s to %s)", formatNumber(s.Median), formatNumber(s.Min), formatNumber(s.Max))
}

// folders matches the folders of an absolute path.
var folders = regexp.MustCompile(`/(?:[\w.+~@-]+/)+`)

// withoutFolders shortens a command line for the reader.
func withoutFolders(command string) string { return folders.ReplaceAllString(command, "") }

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// formatHost is a host in one line.
func formatHost(h Host) string {
	text := fmt.Sprintf("%s, %d cores, %d GiB, Linux %s, KVM %s", h.CPU, h.Cores, (h.RAM+1<<29)>>30, h.Kernel, h.KVM)
	if h.QEMU != "" {
		text += ", QEMU " + h.QEMU
	}
	if h.EmulatedOn != nil {
		text += "; emulated by QEMU TCG on: " + formatHost(*h.EmulatedOn)
	}
	return text
}
