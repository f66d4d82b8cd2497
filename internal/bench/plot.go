package bench

import (
	"fmt"
	"html"
	"math"
	"path/filepath"
	"strconv"
	"strings"
)

// Figure is a plot of what a benchmark found: panels beside each other that share
// their series' colors and the legend.
type Figure struct {
	Title  string  `json:"title"`
	Panels []Panel `json:"panels"`
}

// Panel is a plot with axes.
type Panel struct {
	X      string   `json:"x"` // what the axes show, with their units
	Y      string   `json:"y"`
	Series []Series `json:"series"`
}

// Series is a line through points, in ascending order of X.
type Series struct {
	Name string `json:"name"`
	// Style counts the contestants, Shade what a contestant is seen at.
	Style  int     `json:"style"`
	Shade  int     `json:"shade"`
	Points []Point `json:"points"`
}

// Point is a median, with the extremes.
type Point struct {
	X   float64 `json:"x"`
	Y   float64 `json:"y"`
	Min float64 `json:"min"`
	Max float64 `json:"max"`
}

// The places of a figure, in pixels.
const (
	panelWidth, panelHeight = 380, 300
	marginLeft, marginRight = 64, 16
	marginTop, marginBottom = 44, 50
	legendLine              = 18
	tickCount               = 6
)

// colors are of contestants, told apart by those who see few colors, too (Okabe
// and Ito); dashes are of what they are seen at.
func seriesColor(style int) string {
	return []string{"#0072b2", "#d55e00", "#009e73", "#cc79a7"}[style%4]
}

func seriesDash(shade int) string { return []string{"none", "7 4", "2 3"}[shade%3] }

// SVG draws the figure as an SVG 1.1 document.
func (f *Figure) SVG() []byte {
	names := f.legend()
	width := len(f.Panels) * (marginLeft + panelWidth + marginRight)
	height := marginTop + panelHeight + marginBottom + (len(names)+1)/2*legendLine + 10
	var out strings.Builder
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="DejaVu Sans, Helvetica, sans-serif" font-size="12">`+"\n", width, height, width, height)
	fmt.Fprintf(&out, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", width, height)
	fmt.Fprintf(&out, `<text x="%d" y="22" font-size="14" text-anchor="middle">%s</text>`+"\n", width/2, html.EscapeString(f.Title))
	for i := range f.Panels {
		f.Panels[i].draw(&out, i*(marginLeft+panelWidth+marginRight)+marginLeft)
	}
	for i, s := range names {
		x, y := marginLeft+i%2*width/2, marginTop+panelHeight+marginBottom+i/2*legendLine
		fmt.Fprintf(&out, `<path d="M%d %dh36" stroke="%s" stroke-width="2" stroke-dasharray="%s"/><text x="%d" y="%d">%s</text>`+"\n",
			x, y, seriesColor(s.Style), seriesDash(s.Shade), x+42, y+4, html.EscapeString(s.Name))
	}
	out.WriteString("</svg>\n")
	return []byte(out.String())
}

// legend returns one series of each name.
func (f *Figure) legend() []Series {
	var list []Series
	seen := map[string]bool{}
	for _, p := range f.Panels {
		for _, s := range p.Series {
			if !seen[s.Name] {
				seen[s.Name], list = true, append(list, s)
			}
		}
	}
	return list
}

// draw draws a panel whose plot begins at left.
func (p *Panel) draw(out *strings.Builder, left int) {
	maxX, maxY := 0.0, 0.0
	for _, s := range p.Series {
		for _, pt := range s.Points {
			maxX, maxY = max(maxX, pt.X), max(maxY, pt.Y, pt.Max)
		}
	}
	stepX, stepY := tickStep(maxX), tickStep(maxY)
	maxX, maxY = stepX*math.Ceil(maxX/stepX), stepY*math.Ceil(maxY/stepY)
	x := func(v float64) float64 { return float64(left) + v/maxX*panelWidth }
	y := func(v float64) float64 { return marginTop + panelHeight - v/maxY*panelHeight }
	for v := 0.0; v <= maxX+stepX/2; v += stepX {
		fmt.Fprintf(out, `<path d="M%.1f %dv%d" stroke="#dddddd"/><text x="%.1f" y="%d" text-anchor="middle">%s</text>`+"\n",
			x(v), marginTop, panelHeight, x(v), marginTop+panelHeight+16, tickText(v))
	}
	for v := 0.0; v <= maxY+stepY/2; v += stepY {
		fmt.Fprintf(out, `<path d="M%d %.1fh%d" stroke="#dddddd"/><text x="%d" y="%.1f" text-anchor="end">%s</text>`+"\n",
			left, y(v), panelWidth, left-6, y(v)+4, tickText(v))
	}
	fmt.Fprintf(out, `<path d="M%d %dv%dh%d" fill="none" stroke="#000000"/>`+"\n", left, marginTop, panelHeight, panelWidth)
	fmt.Fprintf(out, `<text x="%d" y="%d" text-anchor="middle">%s</text>`+"\n", left+panelWidth/2, marginTop+panelHeight+34, html.EscapeString(p.X))
	fmt.Fprintf(out, `<text transform="translate(%d %d) rotate(-90)" text-anchor="middle">%s</text>`+"\n", left-48, marginTop+panelHeight/2, html.EscapeString(p.Y))
	for _, s := range p.Series {
		s.draw(out, x, y)
	}
}

// draw draws a line with its points, and how far the rounds lie apart.
func (s *Series) draw(out *strings.Builder, x, y func(float64) float64) {
	if len(s.Points) == 0 {
		return
	}
	var path strings.Builder
	for i, pt := range s.Points {
		command := "L"
		if i == 0 {
			command = "M"
		}
		fmt.Fprintf(&path, "%s%.1f %.1f", command, x(pt.X), y(pt.Y))
	}
	color := seriesColor(s.Style)
	fmt.Fprintf(out, `<path d="%s" fill="none" stroke="%s" stroke-width="2" stroke-dasharray="%s"/>`+"\n", path.String(), color, seriesDash(s.Shade))
	for _, pt := range s.Points {
		fmt.Fprintf(out, `<path d="M%.1f %.1fV%.1f" stroke="%s" stroke-opacity="0.4"/><circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>`+"\n",
			x(pt.X), y(pt.Min), y(pt.Max), color, x(pt.X), y(pt.Y), color)
	}
}

// tickStep is 1, 2 or 5 times a power of ten, so that some ticks reach highest.
func tickStep(highest float64) float64 {
	if highest <= 0 {
		return 1
	}
	power := math.Pow(10, math.Floor(math.Log10(highest/tickCount)))
	for _, m := range []float64{1, 2, 5} {
		if highest/(m*power) <= tickCount {
			return m * power
		}
	}
	return 10 * power
}

func tickText(v float64) string { return strconv.FormatFloat(math.Round(v*1e6)/1e6, 'f', -1, 64) }

// figureFile is where a benchmark's figure stands, beside the document.
func figureFile(benchmark string) string { return benchmark + ".svg" }

// writeFigures draws the figures of a report beside a document.
func writeFigures(document string, r Report) error {
	for i := range r.Results {
		if f := r.Results[i].Figure; f != nil {
			if err := replaceFile(filepath.Join(filepath.Dir(document), figureFile(r.Results[i].Name)), f.SVG()); err != nil {
				return fmt.Errorf("figure: %w", err)
			}
		}
	}
	return nil
}
