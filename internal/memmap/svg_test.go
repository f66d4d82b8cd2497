package memmap

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"image"
	"image/color"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestSVGEqualsPNG paints the paths of the SVG and compares all pixels that no
// text covers.
func TestSVGEqualsPNG(t *testing.T) {
	for _, bytes := range []uint64{300<<20 + PageSize, 6 << 30} {
		m := synthetic(bytes, 2, 6)
		m.Name = `<&"ü>`
		m.Notes = append(m.Notes, "\x00\x1b\xff\ufffe")
		l, img := m.draw(t)
		got, words := parseSVG(t, m)
		if got.Rect != img.Rect {
			t.Fatalf("SVG %v, PNG %v", got.Rect, img.Rect)
		}
		if !slices.ContainsFunc(words, func(s string) bool { return strings.Contains(s, m.Name) }) {
			t.Error("the SVG lacks the name")
		}
		field := image.Rect(l.origin.X, l.origin.Y, l.origin.X+l.Columns*l.tile.pitchX(), l.Size.Y)
		if len(l.starts) > 1 {
			field.Min.Y = l.starts[1].y // below the words in the hole
		}
		for y := field.Min.Y; y < field.Max.Y; y++ {
			for x := field.Min.X; x < field.Max.X; x++ {
				if got.At(x, y) != img.At(x, y) {
					t.Fatalf("(%d, %d): SVG %v, PNG %v", x, y, got.At(x, y), img.At(x, y))
				}
			}
		}
	}
}

// parseSVG paints the paths of a map's SVG.
func parseSVG(t *testing.T, m *Map) (*image.RGBA, []string) {
	t.Helper()
	var out bytes.Buffer
	if err := m.SVG(&out); err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Width  int `xml:"width,attr"`
		Height int `xml:"height,attr"`
		Paths  []struct {
			Fill string `xml:"fill,attr"`
			D    string `xml:"d,attr"`
		} `xml:"path"`
		Words []string `xml:"g>text"`
	}
	if err := xml.Unmarshal(out.Bytes(), &doc); err != nil {
		t.Fatal(err)
	}
	img := image.NewRGBA(image.Rect(0, 0, doc.Width, doc.Height))
	for _, p := range doc.Paths {
		rgb, err := strconv.ParseUint(p.Fill[1:], 16, 32)
		if err != nil {
			t.Fatal(err)
		}
		c := color.RGBA{uint8(rgb >> 16), uint8(rgb >> 8), uint8(rgb), 0xff}
		for _, rect := range strings.Split(strings.Trim(p.D, "Mz"), "zM") {
			var x, y, w, h, back int
			if _, err := fmt.Sscanf(rect, "%d %dh%dv%dh-%d", &x, &y, &w, &h, &back); err != nil || back != w {
				t.Fatalf("%q: %v", rect, err)
			}
			for i := range w * h {
				img.SetRGBA(x+i%w, y+i/w, c)
			}
		}
	}
	return img, doc.Words
}
