package bench

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func sampleFigure() *Figure {
	line := func(name string, style, shade int, points ...Point) Series { return Series{name, style, shade, points} }
	return &Figure{Title: "a < b", Panels: []Panel{
		{X: "rate, MiB/s", Y: "downtime, ms", Series: []Series{
			line("ditto", 0, 0, Point{0, 10, 5, 20}, Point{100, 50, 50, 50}), line("qemu", 1, 1, Point{0, 100, 90, 470}),
		}},
		{X: "rate, MiB/s", Y: "time, s", Series: []Series{line("ditto", 0, 0), line("qemu", 1, 1)}},
	}}
}

// TestFigure: the document is XML, with every point at its place, names in the
// legend once, and both contestants told apart.
func TestFigure(t *testing.T) {
	svg := sampleFigure().SVG()
	var texts []string
	circles, colors := map[string]bool{}, map[string]bool{}
	for in, inText := xml.NewDecoder(bytes.NewReader(svg)), false; ; {
		token, err := in.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, svg)
		}
		switch token := token.(type) {
		case xml.StartElement:
			inText = token.Name.Local == "text"
			if token.Name.Local == "circle" {
				circles[token.Attr[0].Value+" "+token.Attr[1].Value] = true
				colors[token.Attr[3].Value] = true
			}
		case xml.CharData:
			if inText {
				texts = append(texts, string(token))
			}
		}
	}
	all := "|" + strings.Join(texts, "|") + "|"
	for text, times := range map[string]int{"a < b": 1, "ditto": 1, "qemu": 1, "rate, MiB/s": 2, "downtime, ms": 1, "500": 1} {
		if n := strings.Count(all, "|"+text+"|"); n != times {
			t.Errorf("%q stands %d times, not %d, in %s", text, n, times, all)
		}
	}
	// The axes end at 100 and 500.
	for _, at := range []string{"64.0 338.0", "444.0 314.0", "64.0 284.0"} {
		if !circles[at] {
			t.Errorf("no point at %s of %v", at, circles)
		}
	}
	if len(circles) != 3 || len(colors) != 2 {
		t.Errorf("points %v, colors %v", circles, colors)
	}
}

func TestTickStep(t *testing.T) {
	for highest, want := range map[float64]float64{0: 1, 0.3: 0.05, 1: 0.2, 6: 1, 7: 2, 470: 100, 1300: 500} {
		if got := tickStep(highest); math.Abs(got-want) > want/1e6 {
			t.Errorf("up to %v: %v, not %v", highest, got, want)
		}
	}
}

// TestFigureInDocument: the figure is linked, and stands beside the document.
func TestFigureInDocument(t *testing.T) {
	path := filepath.Join(t.TempDir(), "doc.md")
	if err := os.WriteFile(path, []byte(MarkerBegin+MarkerEnd), 0o600); err != nil {
		t.Fatal(err)
	}
	report := sampleReport(t)
	report.Results[0].Figure = sampleFigure()
	if err := UpdateDocument(path, report); err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile(path)
	if err != nil || !strings.Contains(string(doc), "![a < b](fake.svg)") {
		t.Errorf("%v, %s", err, doc)
	}
	if svg, err := os.ReadFile(filepath.Join(filepath.Dir(path), "fake.svg")); err != nil || !bytes.Equal(svg, sampleFigure().SVG()) {
		t.Errorf("%v, %d bytes", err, len(svg))
	}
}

// TestCurveFigure: each contestant and network is a line in both panels.
func TestCurveFigure(t *testing.T) {
	b := migrateCurve()
	r := Result{Rounds: 1}
	for _, name := range []string{nameDitto, nameQEMU} {
		e := Entry{Contestant: Contestant{Name: name}, Values: map[string][]float64{}}
		for i, m := range b.Metrics {
			e.Values[m.Name] = []float64{float64(i)}
		}
		r.Entries = append(r.Entries, e)
	}
	if err := r.conclude(&b); err != nil {
		t.Fatal(err)
	}
	for _, p := range r.Figure.Panels {
		if len(p.Series) != 2*len(curveLinks()) {
			t.Errorf("%s: %d lines", p.Y, len(p.Series))
		}
		for _, s := range p.Series {
			if len(s.Points) != len(curveRates()) {
				t.Errorf("%s, %s: %d points", p.Y, s.Name, len(s.Points))
			}
		}
	}
}
