package memmap

import (
	"fmt"
	"image"
)

// mapLine is a line of the legend's right column.
type mapLine struct {
	words  string
	frames int
	bytes  uint64
	swatch bool
	framed bool
	paint  paint
}

const titleLines = 2

// legendHeight is what title, notes and legend take, in pixels.
func (m *Map) legendHeight() int {
	lines := max(len(m.Classes), len(m.mappings())) + 1
	return (titleLines+len(m.Notes)+lines)*lineHeight + lineHeight
}

// kindWords says what a class is.
var kindWords = map[Kind]string{
	NotPopulated: "not populated: takes no host memory",
	Zero:         "zeros",
	OtherLayers:  "blocks of other layers",
	Parent:       "pages of the parent snapshot",
	Duplicate:    "duplicates: equal another page",
	Unique:       "unique: equal nothing known",
	Unknown:      "unknown: populated, not looked at",
}

// label is a class in at most width characters.
func (c Class) label(width int) string {
	words := kindWords[c.Kind]
	if c.Kind == Layer {
		words = "blocks of " + c.Title
	}
	if words == "" {
		words = string(c.Kind)
	}
	runes := []rune(words)
	if len(runes) <= width {
		return words
	}
	// The end of a path tells more than its middle.
	head := min(len("blocks of "), width/2)
	return string(runes[:head]) + "..." + string(runes[len(runes)-(width-head-3):])
}

// mappings returns the lines about frames.
func (m *Map) mappings() []mapLine {
	if len(m.Frames) == 0 && m.Bytes() >= LargeFrameSize {
		return []mapLine{{words: "not known: the kernel is too old to tell"}}
	}
	states, why := m.frameCounts()
	of := func(n int) uint64 { return uint64(n) * LargeFrameSize }
	lines := []mapLine{
		{"large frames: one 2 MiB mapping", states[Large], of(states[Large]), true, true, shade},
		{"small frames: 4 KiB mappings", states[Small], of(states[Small]), true, false, shade},
	}
	for i, n := range why {
		words := "  no reason left, or no huge page free"
		if i < len(reasons) {
			words = "  " + reasons[i]
		}
		if n > 0 {
			lines = append(lines, mapLine{words: words, frames: n, bytes: of(n)})
		}
	}
	return append(lines, mapLine{"empty frames: nothing populated", states[Empty], of(states[Empty]), false, false, paper})
}

// scale says what a tile and a dot are.
func (l *Layout) scale() string {
	frames := l.tile.bytes / LargeFrameSize
	switch {
	case l.m.CellBytes == PageSize:
		return fmt.Sprintf("Each dot is a page of 4 KiB. Each tile of %d x %d dots is a frame of 2 MiB, with a dark border where the host maps it as one.", l.tile.cols, l.tile.rows)
	case frames == 1:
		return "Each tile is a frame of 2 MiB, coloured in proportion to its pages, with a dark border where the host maps it as one."
	}
	return fmt.Sprintf("Each tile is %s, coloured in proportion to its pages, with a dark border where at least half of its %d frames are large.", size(l.tile.bytes), frames)
}

// Columns of the legend, in characters.
const (
	wordsWidth = 46
	legendGap  = 32 // pixels between the two
)

// drawLegend draws everything above the tiles.
func (l *Layout) drawLegend(c canvas) {
	at := image.Pt(16, l.legendY)
	next := func() { at.Y += lineHeight }
	total := l.m.Bytes()
	c.text(at, fmt.Sprintf("Memory of %s: %s", l.m.Name, size(total)), bold)
	next()
	c.text(at, l.scale(), plain)
	next()
	for _, note := range l.m.Notes {
		c.text(at, note, plain)
		next()
	}
	at.Y += lineHeight / 2
	share := func(n uint64) float64 { return 100 * float64(n) / float64(max(total, 1)) }
	y := at.Y
	c.text(at.Add(image.Pt(24, 0)), fmt.Sprintf("%-*s %10s %9s %8s", wordsWidth, "what pages equal", "pages", "size", "of RAM"), muted)
	next()
	for i, class := range l.m.Classes {
		swatch(c, at, classPaint(byte(i)), false)
		c.text(at.Add(image.Pt(24, 0)), fmt.Sprintf("%-*s %10d %9s %6.1f %%",
			wordsWidth, class.label(wordsWidth), class.Bytes/PageSize, size(class.Bytes), share(class.Bytes)), plain)
		next()
	}
	at = image.Pt(16+24+(wordsWidth+31)*charWidth+legendGap, y)
	const words = wordsWidth - 2
	c.text(at.Add(image.Pt(24, 0)), fmt.Sprintf("%-*s %7s %9s", words, "how the host maps them", "frames", "size"), muted)
	next()
	for _, line := range l.m.mappings() {
		if line.swatch {
			swatch(c, at, line.paint, line.framed)
		}
		c.text(at.Add(image.Pt(24, 0)), fmt.Sprintf("%-*s %7d %9s", words, line.words, line.frames, size(line.bytes)), plain)
		next()
	}
}

// swatch shows a colour, or a frame around it.
func swatch(c canvas, at image.Point, p paint, framed bool) {
	r := image.Rectangle{at.Add(image.Pt(2, 3)), at.Add(image.Pt(16, 17))}
	c.fill(r, p)
	if framed {
		outline(c, r, 2, ink)
	}
}
