package memmap

import (
	"bufio"
	"fmt"
	"image"
	"io"
	"strings"
	"unicode/utf8"
)

// SVG draws the map as an SVG 1.1 document: one path a colour, so that its size
// follows the runs of equal pages.
func (m *Map) SVG(w io.Writer) error {
	if err := m.Check(); err != nil {
		return fmt.Errorf("memory map: %w", err)
	}
	l := NewLayout(m)
	c := &vector{paths: make([]strings.Builder, firstClass+paint(len(m.Classes)))}
	l.draw(c)
	out := bufio.NewWriter(w)
	fmt.Fprintf(out, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" shape-rendering="crispEdges">`+"\n", l.Size.X, l.Size.Y, l.Size.X, l.Size.Y)
	fmt.Fprintf(out, "<title>%s</title>\n", escape("Memory of "+m.Name))
	for p, colour := range m.palette() {
		if path := c.paths[p].String(); path != "" {
			fmt.Fprintf(out, `<path fill="#%02x%02x%02x" d="%s"/>`+"\n", colour.R, colour.G, colour.B, path)
		}
	}
	fmt.Fprintf(out, `<g font-family="Inconsolata, DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="13.3" xml:space="preserve">`+"\n%s</g>\n</svg>\n", c.words.String())
	if err := out.Flush(); err != nil {
		return fmt.Errorf("write SVG: %w", err)
	}
	return nil
}

// vector is a canvas of paths. Shapes of different colours do not overlap,
// except over the paper, which is drawn first.
type vector struct {
	paths []strings.Builder // by paint
	words strings.Builder
}

func (c *vector) fill(r image.Rectangle, p paint) {
	if !r.Empty() {
		fmt.Fprintf(&c.paths[p], "M%d %dh%dv%dh-%dz", r.Min.X, r.Min.Y, r.Dx(), r.Dy(), r.Dx())
	}
}

func (c *vector) text(at image.Point, s string, f face) {
	colour, weight := colInk, ""
	switch f {
	case bold:
		weight = ` font-weight="bold"`
	case muted:
		colour = colQuiet
	}
	// textLength keeps columns aligned whatever font the viewer has.
	fmt.Fprintf(&c.words, `<text x="%d" y="%d" textLength="%d" fill="#%02x%02x%02x"%s>%s</text>`+"\n",
		at.X, at.Y+15, charWidth*len([]rune(s)), colour.R, colour.G, colour.B, weight, escape(s))
}

// escape makes s content of an element (XML 1.0, 2.4): markup is escaped, what no
// document may hold is replaced. encoding/xml would cost every process of ditto
// some of its start.
func escape(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0xfffe || r == 0xffff {
			return utf8.RuneError
		}
		return r
	}, strings.ToValidUTF8(s, string(utf8.RuneError)))
	return strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;").Replace(s)
}
