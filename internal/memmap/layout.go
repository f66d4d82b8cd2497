package memmap

import (
	"image"
	"math"
)

// Layout says where everything of a picture lies, in pixels.
type Layout struct {
	// Size of the picture.
	Size image.Point
	// Columns is the number of tiles in a row, a power of two.
	Columns int

	m       *Map
	tile    tile
	origin  image.Point // of the first tile
	starts  []band
	legendY int
}

// tile is the shape of one.
type tile struct {
	bytes      uint64
	cols, rows int // dots
	dot        int // pixels a side
	line       int // width of the frame around it
	gap        int // to the next tile
}

func (t tile) pitchX() int { return t.cols*t.dot + 2*t.line + t.gap }
func (t tile) pitchY() int { return t.rows*t.dot + 2*t.line + t.gap }

// band is the part of the picture that shows one region.
type band struct {
	y     int // of its first row
	tiles int
	first int // index of its first tile, all regions together
	frame int // index of its first whole large frame
}

// How large the field of tiles may be. Beyond, tiles get smaller.
const (
	maxWidth  = 2080
	maxHeight = 1360
	// idealRatio of width to height chooses between equally large tiles.
	idealRatio = 1.5
)

// Margins, in pixels.
const (
	marginLeft   = 112 // addresses
	marginRight  = 96  // sizes
	marginBottom = 16
	axisHeight   = 24
	holeHeight   = 32
	minField     = 1032 // below, the legend does not fit
)

// NewLayout arranges the map, which must pass [Map.Check].
func NewLayout(m *Map) *Layout {
	l := &Layout{m: m}
	total := 0
	tileBytes := max(m.CellBytes, LargeFrameSize)
	frame := 0
	for _, r := range m.Regions {
		n := int((r.Bytes + tileBytes - 1) / tileBytes)
		l.starts = append(l.starts, band{tiles: n, first: total, frame: frame})
		total += n
		frame += int(r.Bytes / LargeFrameSize)
	}
	for _, t := range m.shapes() {
		if l.tile, l.Columns = t, l.bestColumns(t); l.Columns > 0 {
			break
		}
	}
	if l.Columns == 0 { // many small regions: the picture is higher than it should be
		l.Columns = 1 << int(math.Ceil(math.Log2(math.Sqrt(float64(total)))))
	}
	l.place()
	return l
}

// shapes returns the tiles that the map can be drawn with, the largest first.
func (m *Map) shapes() []tile {
	var all []tile
	if m.CellBytes == PageSize {
		for dot := 4; dot >= 1; dot-- {
			all = append(all, tile{bytes: LargeFrameSize, cols: 32, rows: 16, dot: dot, line: min(dot, 2), gap: 1 + min(dot, 2)})
		}
		return all
	}
	for side := 20; side >= 2; side-- {
		all = append(all, tile{bytes: m.CellBytes, cols: side, rows: side, dot: 1, line: 1, gap: min(side/3, 2)})
	}
	return all
}

// rows returns the height of all bands in tiles.
func (l *Layout) rows(columns int) int {
	n := 0
	for _, b := range l.starts {
		n += (b.tiles + columns - 1) / columns
	}
	return n
}

// bestColumns returns how many tiles of a shape stand in a row, 0 if they do not
// fit at all.
func (l *Layout) bestColumns(t tile) int {
	best, bestOff := 0, math.Inf(1)
	for columns := 1; columns*t.pitchX() <= maxWidth; columns *= 2 {
		w, h := columns*t.pitchX(), l.rows(columns)*t.pitchY()
		if h > maxHeight {
			continue
		}
		if off := math.Abs(math.Log(float64(w) / float64(h) / idealRatio)); off < bestOff {
			best, bestOff = columns, off
		}
	}
	return best
}

func (l *Layout) place() {
	l.legendY = 16
	l.origin = image.Pt(marginLeft, l.legendY+l.m.legendHeight()+axisHeight)
	y := l.origin.Y
	for i := range l.starts {
		b := &l.starts[i]
		if i > 0 {
			y += holeHeight
		}
		b.y = y
		y += (b.tiles + l.Columns - 1) / l.Columns * l.tile.pitchY()
	}
	l.Size = image.Pt(marginLeft+max(l.Columns*l.tile.pitchX(), minField)+marginRight, y+marginBottom)
}

// tileRect returns the place of the dots of a tile of a band, without the frame.
func (l *Layout) tileRect(b band, n int) image.Rectangle {
	x := l.origin.X + n%l.Columns*l.tile.pitchX() + l.tile.line
	y := b.y + n/l.Columns*l.tile.pitchY() + l.tile.line
	return image.Rect(x, y, x+l.tile.cols*l.tile.dot, y+l.tile.rows*l.tile.dot)
}

// dotRect returns the place of the dot i of a tile that lies at r.
func (l *Layout) dotRect(r image.Rectangle, i int) image.Rectangle {
	p := r.Min.Add(image.Pt(i%l.tile.cols*l.tile.dot, i/l.tile.cols*l.tile.dot))
	return image.Rectangle{p, p.Add(image.Pt(l.tile.dot, l.tile.dot))}
}

// Tile returns the place of the tile that shows an address, without the frame
// around it, and whether there is one.
func (l *Layout) Tile(gpa uint64) (image.Rectangle, bool) {
	for i, r := range l.m.Regions {
		if gpa >= r.Start && gpa-r.Start < r.Bytes {
			return l.tileRect(l.starts[i], int((gpa-r.Start)/l.tile.bytes)), true
		}
	}
	return image.Rectangle{}, false
}

// Dot returns the place of the dot of the page at an address. Maps of counts
// have none.
func (l *Layout) Dot(gpa uint64) (image.Rectangle, bool) {
	tile, ok := l.Tile(gpa)
	if !ok || l.m.CellBytes != PageSize {
		return image.Rectangle{}, false
	}
	return l.dotRect(tile, int(gpa%LargeFrameSize/PageSize)), true
}
