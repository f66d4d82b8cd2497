package memmap

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"image"
	"image/png"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var pictures = flag.String("pictures", "", "a folder to put the pictures of the tests into")

func (m *Map) draw(t *testing.T) (*Layout, *image.Paletted) {
	t.Helper()
	img, err := m.image()
	if err != nil {
		t.Fatal(err)
	}
	return NewLayout(m), img
}

// TestPictures writes the pictures that -pictures asks for.
func TestPictures(t *testing.T) {
	if *pictures == "" {
		t.Skip("no folder; try: go test ./internal/memmap -pictures /tmp")
	}
	for _, s := range sizes {
		m := drawn(s.bytes, s.layers)
		for suffix, write := range map[string]func(io.Writer) error{"png": m.PNG, "svg": m.SVG} {
			f, err := os.Create(filepath.Join(*pictures, fmt.Sprintf("map-%dm.%s", s.bytes>>20, suffix)))
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(write(f), f.Close()); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestEveryPage: each page is drawn once, inside the picture, in the colour of
// its class, and nothing else is drawn there.
func TestEveryPage(t *testing.T) {
	for _, s := range sizes {
		if s.bytes > 4<<30 || testing.Short() && s.bytes > 1<<30 {
			continue
		}
		m := drawn(s.bytes, s.layers)
		l, img := m.draw(t)
		taken := make([]bool, l.Size.X*l.Size.Y)
		page := 0
		for _, r := range m.Regions {
			for off := uint64(0); off < r.Bytes; off += PageSize {
				dot, ok := l.Dot(r.Start + off)
				if !ok || dot.Empty() || !dot.In(img.Rect) {
					t.Fatalf("%d bytes: page %#x is drawn at %v", s.bytes, r.Start+off, dot)
				}
				for y := dot.Min.Y; y < dot.Max.Y; y++ {
					for x := dot.Min.X; x < dot.Max.X; x++ {
						at := y*l.Size.X + x
						if taken[at] || paint(img.Pix[img.PixOffset(x, y)]) != classPaint(m.Pages[page]) {
							t.Fatalf("%d bytes: page %#x of class %d at (%d, %d): taken %v, paint %d", s.bytes, r.Start+off, m.Pages[page], x, y, taken[at], img.Pix[img.PixOffset(x, y)])
						}
						taken[at] = true
					}
				}
				page++
			}
		}
		if _, ok := l.Dot(3 << 30); ok {
			t.Error("the hole has a dot")
		}
	}
}

// TestEveryCount: each tile has as many dots of each class as its share, to a
// dot, and the picture as a whole is right to a thousandth.
func TestEveryCount(t *testing.T) {
	for _, s := range sizes {
		if s.bytes <= 4<<30 || s.bytes > 64<<30 {
			continue
		}
		m := drawn(s.bytes, s.layers)
		l, img := m.draw(t)
		areas := make([]int, len(m.Classes))
		cell, dots, whole := 0, 0, int(m.CellBytes/PageSize)
		for _, r := range m.Regions {
			for off := uint64(0); off < r.Bytes; off += m.CellBytes {
				rect, ok := l.Tile(r.Start + off)
				if !ok || !rect.In(img.Rect) {
					t.Fatalf("cell %#x is drawn at %v", r.Start+off, rect)
				}
				got := make([]int, len(m.Classes))
				for y := rect.Min.Y; y < rect.Max.Y; y++ {
					for x := rect.Min.X; x < rect.Max.X; x++ {
						if p := paint(img.Pix[img.PixOffset(x, y)]); p >= firstClass {
							got[p-firstClass]++
							areas[p-firstClass]++
						}
					}
				}
				area := rect.Dx() * rect.Dy()
				dots += area
				for class, n := range m.Counts[cell*len(m.Classes) : (cell+1)*len(m.Classes)] {
					if off := got[class]*whole - int(n)*area; off > whole || off < -whole {
						t.Fatalf("cell %d has %d of %d dots for %d of %d pages of class %d", cell, got[class], area, n, whole, class)
					}
				}
				cell++
			}
		}
		for class, n := range areas {
			got, want := float64(n)/float64(dots), float64(m.Classes[class].Bytes)/float64(m.Bytes())
			if got-want > 0.002 || want-got > 0.002 {
				t.Errorf("%d bytes: class %d has %.4f of the area, %.4f of memory", s.bytes, class, got, want)
			}
		}
	}
}

// TestFrames: a border is around the tiles of large frames and around no other.
func TestFrames(t *testing.T) {
	for _, s := range sizes {
		m := drawn(s.bytes, s.layers)
		l, img := m.draw(t)
		large := 0
		for i, r := range m.Regions {
			for n := range l.starts[i].tiles {
				rect, _ := l.Tile(r.Start + uint64(n)*l.tile.bytes)
				want, border := paper, l.border()
				if l.large(i, n) {
					want, large = border, large+1
				}
				for _, p := range []image.Point{{rect.Min.X - 1, rect.Min.Y}, {rect.Max.X, rect.Max.Y - 1}, {rect.Min.X, rect.Min.Y - 1}, {rect.Max.X - 1, rect.Max.Y}} {
					if got := paint(img.Pix[img.PixOffset(p.X, p.Y)]); got != want {
						t.Fatalf("%d bytes: around tile %d of region %d is paint %d, want %d", s.bytes, n, i, got, want)
					}
				}
			}
		}
		states, _ := m.frameCounts()
		if l.tile.bytes == LargeFrameSize && large != states[Large] {
			t.Errorf("%d bytes: %d tiles have a border, %d frames are large", s.bytes, large, states[Large])
		}
	}
}

// TestLegible: pictures fit a screen or two, every label is inside, and none
// overlaps another.
func TestLegible(t *testing.T) {
	for _, s := range append(slices.Clone(sizes), struct {
		bytes  uint64
		layers int
	}{2 << 20, 9}) {
		m := drawn(s.bytes, s.layers)
		l := NewLayout(m)
		if l.Size.X > 2800 || l.Size.Y > 1800 {
			t.Errorf("%d bytes: a picture of %v", s.bytes, l.Size)
		}
		record := &labels{}
		l.draw(record)
		for i, a := range record.at {
			if !a.In(image.Rectangle{Max: l.Size}) {
				t.Errorf("%d bytes: %q at %v is outside of %v", s.bytes, record.words[i], a, l.Size)
			}
			for j, b := range record.at[:i] {
				if a.Overlaps(b) {
					t.Errorf("%d bytes: %q is over %q", s.bytes, record.words[i], record.words[j])
				}
			}
		}
		all := strings.Join(record.words, "\n")
		for i := range m.Regions {
			if want := fmt.Sprintf("0x%010x", m.Regions[i].Start); !strings.Contains(all, want) {
				t.Errorf("%d bytes: no label %s", s.bytes, want)
			}
		}
		if got := strings.Contains(all, "32-bit hole"); got != (len(m.Regions) > 1) {
			t.Errorf("%d bytes: the hole is shown: %v", s.bytes, got)
		}
		for _, class := range m.Classes {
			if !strings.Contains(all, fmt.Sprintf(" %d ", class.Bytes/PageSize)) {
				t.Errorf("%d bytes: the legend has no count of %v", s.bytes, class)
			}
		}
	}
}

// labels is a canvas that keeps where text is.
type labels struct {
	at    []image.Rectangle
	words []string
}

func (*labels) fill(image.Rectangle, paint) {}
func (c *labels) text(at image.Point, s string, _ face) {
	c.at = append(c.at, image.Rectangle{at, at.Add(image.Pt(charWidth*len([]rune(s)), lineHeight-3))})
	c.words = append(c.words, s)
}

func TestCheck(t *testing.T) {
	for name, spoil := range map[string]func(m *Map){
		"no regions":      func(m *Map) { m.Regions = nil },
		"regions overlap": func(m *Map) { m.Regions = append(m.Regions, Region{0, PageSize}) },
		"many regions": func(m *Map) {
			for n := range uint64(16) {
				m.Regions = append(m.Regions, Region{(n + 9) * LargeFrameSize, PageSize})
				m.Pages = append(m.Pages, 0)
			}
		},
		"region not aligned":  func(m *Map) { m.Regions[0].Start = PageSize },
		"part of a page":      func(m *Map) { m.Regions[0].Bytes++ },
		"endless region":      func(m *Map) { m.Regions[0].Bytes = 1 << 63 },
		"no classes":          func(m *Map) { m.Classes = nil },
		"too many classes":    func(m *Map) { m.Classes = make([]Class, 17) },
		"cells of no size":    func(m *Map) { m.CellBytes = 0 },
		"cells of 8 KiB":      func(m *Map) { m.CellBytes = 8192 },
		"too few pages":       func(m *Map) { m.Pages = m.Pages[1:] },
		"a class that is not": func(m *Map) { m.Pages[7] = byte(len(m.Classes)) },
		"too many frames":     func(m *Map) { m.Frames = append(m.Frames, 0) },
		"no counts":           func(m *Map) { m.CellBytes = LargeFrameSize },
	} {
		m := synthetic(16<<20, 1, 7)
		spoil(m)
		if err := m.PNG(io.Discard); err == nil {
			t.Errorf("%s: drawn as PNG", name)
		}
		if err := m.SVG(io.Discard); err == nil {
			t.Errorf("%s: drawn as SVG", name)
		}
	}
	m := synthetic(16<<20, 1, 7)
	m.Frames = nil // nobody knows
	var out bytes.Buffer
	if err := m.PNG(&out); err != nil {
		t.Fatal(err)
	}
	if img, err := png.Decode(&out); err != nil || img.Bounds().Max != NewLayout(m).Size {
		t.Errorf("%v", err)
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 2 << 20: "2 MiB", 5<<30 + 1: "5.0 GiB", 1 << 40: "1 TiB", 3 << 50: "3072 TiB"} {
		if got := size(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}

func BenchmarkPNG(b *testing.B) {
	for _, bytes := range []uint64{256 << 20, 4 << 30, 64 << 30} {
		m := drawn(bytes, 3)
		b.Run(size(bytes), func(b *testing.B) {
			for b.Loop() {
				if err := m.PNG(io.Discard); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
