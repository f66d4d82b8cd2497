package cli

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"ditto.vm/vmm/api"
)

// pageBytes and frameBytes are what memory is counted in.
const (
	pageBytes  = 4096
	frameBytes = 2 << 20
)

// grid is a table whose first column is words and the others numbers.
type grid struct {
	rows  [][]string
	share []float64 // of the row, for its bar; negative for none
}

func (g *grid) add(share float64, cells ...string) {
	g.rows, g.share = append(g.rows, cells), append(g.share, share)
}

// write prints the grid, the first column to the left and the others to the
// right, with bars of so many characters.
func (g *grid) write(out *strings.Builder, bar int) {
	var widths []int
	for _, row := range g.rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], len([]rune(cell)))
		}
	}
	for n, row := range g.rows {
		var line strings.Builder
		for i, cell := range row {
			pad := strings.Repeat(" ", widths[i]-len([]rune(cell)))
			switch i {
			case 0:
				line.WriteString(cell + pad)
			default:
				line.WriteString("  " + pad + cell)
			}
		}
		if bar > 0 && g.share[n] > 0 {
			line.WriteString("  " + strings.Repeat("#", max(1, int(g.share[n]*float64(bar)+0.5))))
		}
		out.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
}

// inspection lays out what is known of a machine's memory, with bars of so many
// characters.
func inspection(name string, m api.Memory, bar int) string {
	var out strings.Builder
	fmt.Fprintf(&out, "%s: %s of memory, %s\n\n", name, humanBytes(m.Bytes), provenance(m.Mode, m.Exact))
	content(m).write(&out, bar)
	out.WriteString("\n")
	mapping(m).write(&out, bar)
	fmt.Fprintf(&out, "\nKVM       %d entries of 4K, %d of 2M, %d of 1G\n", m.Pages4K, m.Pages2M, m.Pages1G)
	fmt.Fprintf(&out, "tracker   %s: sees %s; %s armed\n", m.Tracker.Kind, m.Tracker.Sees, humanBytes(m.Tracker.ArmedBytes))
	fmt.Fprintf(&out, "names     %s\n", counterWords(m.Names))
	if m.Mode == api.MemoryFull {
		fmt.Fprintf(&out, "took      %.3g s%s\n", float64(m.DurMs)/1000, stepWords(m.Steps))
	}
	return out.String()
}

// provenance says how far the numbers can be relied on.
func provenance(mode api.MemoryMode, exact bool) string {
	switch {
	case mode == api.MemoryFull && exact:
		return "exact: the machine was paused and all of it was read"
	case mode == api.MemoryFull:
		return "approximate: read while the machine ran (--exact pauses it)"
	case exact:
		return "as recorded: the machine was paused, memory was not read"
	}
	return "as recorded: memory was not read"
}

// content lists what pages equal. The rows add up to all of memory.
func content(m api.Memory) *grid {
	g := &grid{}
	g.add(0, "WHAT PAGES EQUAL", "SIZE", "PAGES", "OF RAM")
	row := func(words string, bytes uint64) {
		share := float64(bytes) / float64(max(m.Bytes, 1))
		g.add(share, words, humanBytes(bytes), fmt.Sprint(bytes/pageBytes), percent(share))
	}
	row("not populated", m.NotPopulatedBytes)
	row("zeros", m.ZeroBytes)
	for _, l := range m.Layers {
		row(layerWords(l), l.Bytes)
	}
	if m.ParentBytes > 0 {
		row("pages of the parent snapshot", m.ParentBytes)
	}
	row("another page", m.DuplicateBytes)
	row("nothing known", m.UniqueBytes)
	row("not looked at", m.UnknownBytes)
	return g
}

func layerWords(l api.MemoryLayer) string {
	var traits []string
	if !l.Immutable {
		traits = append(traits, "written")
	}
	if l.Indexed {
		traits = append(traits, "indexed")
	}
	words := "blocks of " + filepath.Base(l.Title)
	if len(traits) > 0 {
		words += " (" + strings.Join(traits, ", ") + ")"
	}
	return words
}

// reasonWords explains the reasons of small frames, in the order of the table.
var reasonWords = []struct{ reason, words string }{
	{"shared", "shared with equal pages"},
	{"remap", "mapped from a file"},
	{"balloon", "held by the balloon"},
	{"tracking", "written while tracked"},
	{"partial", "partly populated"},
	{"unexplained", "no reason left, or no huge page free"},
}

// mapping lists how the host maps large frames.
func mapping(m api.Memory) *grid {
	g := &grid{}
	g.add(0, "HOW THE HOST MAPS THEM", "SIZE", "FRAMES", "OF RAM")
	row := func(words string, frames uint64) {
		share := float64(frames) / float64(max(m.Frames.Total, 1))
		g.add(share, words, humanBytes(frames*frameBytes), fmt.Sprint(frames), percent(share))
	}
	if m.Frames.Total == 0 {
		g.add(0, "unknown: the kernel is too old to tell")
		return g
	}
	row("large: 2 MiB at once", m.Frames.Large)
	row("small: 4 KiB each", m.Frames.Small)
	for _, r := range reasonWords {
		if n := m.Frames.Reasons[r.reason]; n > 0 {
			g.add(-1, "  "+r.words, humanBytes(n*frameBytes), fmt.Sprint(n))
		}
	}
	row("empty", m.Frames.Empty)
	return g
}

func percent(share float64) string { return fmt.Sprintf("%.1f %%", 100*share) }

// counterWords lists what the book of names counted.
func counterWords(n api.MemoryNames) string {
	if !n.Enabled {
		return "off (start the machine with --names on)"
	}
	var words []string
	for _, name := range slices.Sorted(maps.Keys(n.Counters)) {
		if n.Counters[name] > 0 {
			words = append(words, fmt.Sprintf("%s %d", strings.ReplaceAll(name, "_", " "), n.Counters[name]))
		}
	}
	if len(words) == 0 {
		return "on, nothing recorded yet"
	}
	return strings.Join(words, ", ")
}

// stepWords says what each step of a full look decided.
func stepWords(steps []api.MemoryStep) string {
	var words []string
	for _, s := range steps {
		if s.Bytes > 0 {
			words = append(words, fmt.Sprintf("%s %s", s.Name, humanBytes(s.Bytes)))
		}
	}
	if len(words) == 0 {
		return ""
	}
	return "; decided by " + strings.Join(words, ", ")
}
