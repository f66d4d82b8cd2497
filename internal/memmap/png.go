package memmap

import (
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"io"

	"golang.org/x/image/font"
	"golang.org/x/image/font/inconsolata"
	"golang.org/x/image/math/fixed"
)

// PNG draws the map as a PNG image.
func (m *Map) PNG(w io.Writer) error {
	img, err := m.image()
	if err != nil {
		return err
	}
	encoder := png.Encoder{CompressionLevel: png.BestSpeed}
	if err := encoder.Encode(w, img); err != nil {
		return fmt.Errorf("write PNG: %w", err)
	}
	return nil
}

// image draws the map.
func (m *Map) image() (*image.Paletted, error) {
	if err := m.Check(); err != nil {
		return nil, fmt.Errorf("memory map: %w", err)
	}
	l := NewLayout(m)
	var colours color.Palette
	for _, c := range m.palette() {
		colours = append(colours, c)
	}
	// Letters have soft edges.
	for grey := 0x30; grey < 0x100; grey += 0x18 {
		colours = append(colours, color.RGBA{uint8(grey), uint8(grey), uint8(grey), 0xff})
	}
	c := &raster{image.NewPaletted(image.Rectangle{Max: l.Size}, colours)}
	l.draw(c)
	return c.img, nil
}

// raster is a canvas of pixels.
type raster struct{ img *image.Paletted }

func (c *raster) fill(r image.Rectangle, p paint) {
	r = r.Intersect(c.img.Rect)
	for y := r.Min.Y; y < r.Max.Y; y++ {
		row := c.img.Pix[c.img.PixOffset(r.Min.X, y):c.img.PixOffset(r.Max.X, y)]
		for i := range row {
			row[i] = uint8(p)
		}
	}
}

func (c *raster) text(at image.Point, s string, f face) {
	face, colour := inconsolata.Regular8x16, colInk
	switch f {
	case bold:
		face = inconsolata.Bold8x16
	case muted:
		colour = colQuiet
	}
	d := font.Drawer{
		Dst: draw.Image(c.img), Src: image.NewUniform(colour), Face: face,
		Dot: fixed.P(at.X, at.Y+face.Ascent+1),
	}
	d.DrawString(s)
}
