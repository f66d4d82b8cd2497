package memmap

import (
	"fmt"
	"image"
)

// canvas is what a picture is drawn on.
type canvas interface {
	fill(r image.Rectangle, p paint)
	// text writes a line whose upper left corner is at. Characters are
	// charWidth wide.
	text(at image.Point, s string, f face)
}

// face is how text looks.
type face int

const (
	plain face = iota
	bold
	muted
)

// Size of a character, in pixels.
const (
	charWidth  = 8
	lineHeight = 20
)

// noMemory stands for dots outside RAM.
const noMemory = 255

// draw draws the whole picture.
func (l *Layout) draw(c canvas) {
	c.fill(image.Rectangle{Max: l.Size}, paper)
	l.drawLegend(c)
	l.drawAxis(c)
	for i, b := range l.starts {
		if i > 0 {
			l.drawHole(c, i)
		}
		l.drawAddresses(c, i)
		for n := range b.tiles {
			l.drawTile(c, i, n)
		}
	}
}

// drawTile draws a tile of a band: runs of dots of one class, and the frame.
func (l *Layout) drawTile(c canvas, region, n int) {
	b := l.starts[region]
	r := l.tileRect(b, n)
	classes := l.dots(region, n)
	for start := 0; start < len(classes); {
		end := start + 1
		for end < len(classes) && classes[end] == classes[start] && end%l.tile.cols != 0 {
			end++
		}
		if classes[start] != noMemory {
			c.fill(l.dotRect(r, start).Union(l.dotRect(r, end-1)), classPaint(classes[start]))
		}
		start = end
	}
	if l.large(region, n) {
		outline(c, r, l.tile.line, l.border())
	}
}

// border is the paint around large frames: softer around small tiles, whose
// colours it would drown.
func (l *Layout) border() paint {
	if l.tile.cols < 12 {
		return quiet
	}
	return ink
}

// outline draws a frame around r, outside of it.
func outline(c canvas, r image.Rectangle, width int, p paint) {
	o := r.Inset(-width)
	c.fill(image.Rect(o.Min.X, o.Min.Y, o.Max.X, r.Min.Y), p)
	c.fill(image.Rect(o.Min.X, r.Max.Y, o.Max.X, o.Max.Y), p)
	c.fill(image.Rect(o.Min.X, r.Min.Y, r.Min.X, r.Max.Y), p)
	c.fill(image.Rect(r.Max.X, r.Min.Y, o.Max.X, r.Max.Y), p)
}

// large reports whether at least half of the whole frames of a tile are large.
func (l *Layout) large(region, n int) bool {
	perTile := int(l.tile.bytes / LargeFrameSize)
	inRegion := int(l.m.Regions[region].Bytes / LargeFrameSize)
	first, last := n*perTile, min((n+1)*perTile, inRegion)
	count := 0
	for i := first; i < last && len(l.m.Frames) > 0; i++ {
		if l.m.Frames[l.starts[region].frame+i].State() == Large {
			count++
		}
	}
	return count > 0 && 2*count >= last-first
}

// dots returns the class of each dot of a tile.
func (l *Layout) dots(region, n int) []byte {
	out := make([]byte, l.tile.cols*l.tile.rows)
	if l.m.CellBytes == PageSize {
		first := 0
		for _, r := range l.m.Regions[:region] {
			first += int(r.Bytes / PageSize)
		}
		perTile := len(out)
		from, to := n*perTile, min((n+1)*perTile, int(l.m.Regions[region].Bytes/PageSize))
		done := copy(out, l.m.Pages[first+from:first+to])
		for i := done; i < len(out); i++ {
			out[i] = noMemory
		}
		return out
	}
	k := len(l.m.Classes)
	at := (l.starts[region].first + n) * k
	shareOut(out, l.m.Counts[at:at+k], int(l.tile.bytes/PageSize))
	return out
}

// shareOut fills dots with classes in proportion to counts; what counts leave of
// whole lies outside RAM. Every class that occurs gets what it has at least half
// a dot of, so that the sum is right to a dot.
func shareOut(dots []byte, counts []uint16, whole int) {
	at, seen := 0, 0
	for class, n := range counts {
		seen += int(n)
		for end := min((seen*len(dots)+whole/2)/whole, len(dots)); at < end; at++ {
			dots[at] = byte(class)
		}
	}
	for ; at < len(dots); at++ {
		dots[at] = noMemory
	}
}

// drawHole says what lies between two regions.
func (l *Layout) drawHole(c canvas, region int) {
	before := l.m.Regions[region-1]
	from, to := before.Start+before.Bytes, l.m.Regions[region].Start
	r := image.Rect(l.origin.X, l.starts[region].y-holeHeight+4, l.origin.X+max(l.Columns*l.tile.pitchX(), minField)-l.tile.gap, l.starts[region].y-6)
	c.fill(r, shade)
	words := fmt.Sprintf("no RAM from %#x to %#x (%s): the 32-bit hole, for PCI and interrupt controllers", from, to-1, size(to-from))
	c.text(image.Pt(r.Min.X+8, r.Min.Y+3), words, muted)
}

// labelDistance is how far apart labels of rows are at least.
const labelDistance = 18

// drawAddresses labels the rows of a band: addresses to the left, sizes to the
// right.
func (l *Layout) drawAddresses(c canvas, region int) {
	every := 1
	for every*l.tile.pitchY() < labelDistance {
		every *= 2
	}
	b, r := l.starts[region], l.m.Regions[region]
	right := l.origin.X + l.Columns*l.tile.pitchX() + 4
	for row := 0; row*l.Columns < b.tiles; row += every {
		gpa := r.Start + uint64(row*l.Columns)*l.tile.bytes
		y := b.y + row*l.tile.pitchY() + min(l.tile.pitchY()-l.tile.gap, labelDistance)/2 - lineHeight/2 + 1
		c.text(image.Pt(8, y), fmt.Sprintf("0x%010x", gpa), muted)
		c.text(image.Pt(right, y), exactSize(gpa), muted)
	}
}

// drawAxis labels the columns with the distance from the row's address.
func (l *Layout) drawAxis(c canvas) {
	const distance = 80
	every := 1
	for every*l.tile.pitchX() < distance {
		every *= 2
	}
	for column := 0; column < l.Columns; column += every {
		at := image.Pt(l.origin.X+column*l.tile.pitchX(), l.origin.Y-axisHeight)
		c.text(at, "+"+exactSize(uint64(column)*l.tile.bytes), muted)
		c.fill(image.Rect(at.X, l.origin.Y-6, at.X+1, l.origin.Y-2), ink)
	}
}
