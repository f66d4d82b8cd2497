package memmap

import "image/color"

// paint is a colour of the palette.
type paint uint8

// The paints: those below firstClass, and then one for each class.
const (
	paper paint = iota
	ink
	quiet // muted text
	shade
	firstClass
)

// classPaint is the paint of a class by its index.
func classPaint(class byte) paint { return firstClass + paint(class) }

var (
	colPaper = color.RGBA{0xff, 0xff, 0xff, 0xff}
	colInk   = color.RGBA{0x11, 0x14, 0x18, 0xff}
	colQuiet = color.RGBA{0x5b, 0x64, 0x70, 0xff}
	colShade = color.RGBA{0xdf, 0xe3, 0xe8, 0xff}
)

// kindColours are quiet for what costs nothing, and loud for what does. Layers
// have hues of their own, told apart by the colour-blind too (Okabe and Ito).
var kindColours = map[Kind]color.RGBA{
	NotPopulated: {0xee, 0xf0, 0xf2, 0xff},
	Zero:         {0xbc, 0xc4, 0xcd, 0xff},
	OtherLayers:  {0x4d, 0x5b, 0x6b, 0xff},
	Parent:       {0x2f, 0x2f, 0x8f, 0xff},
	Duplicate:    {0xf0, 0xe4, 0x42, 0xff},
	Unique:       {0xd5, 0x3e, 0x1f, 0xff},
	Unknown:      {0x8a, 0x8a, 0x8a, 0xff},
}

var layerColours = [...]color.RGBA{
	{0x00, 0x72, 0xb2, 0xff}, // blue
	{0x00, 0x9e, 0x73, 0xff}, // green
	{0xe6, 0x9f, 0x00, 0xff}, // orange
	{0xcc, 0x79, 0xa7, 0xff}, // pink
	{0x56, 0xb4, 0xe9, 0xff}, // sky
	{0x7b, 0x3f, 0xa0, 0xff}, // violet
	{0x8c, 0x56, 0x4b, 0xff}, // brown
	{0x9a, 0xcd, 0x32, 0xff}, // lime
	{0x1f, 0xc6, 0xc0, 0xff}, // teal
}

// palette returns the colours of all paints of a map.
func (m *Map) palette() []color.RGBA {
	out := []color.RGBA{colPaper, colInk, colQuiet, colShade}
	layers := 0
	for _, c := range m.Classes {
		if c.Kind == Layer {
			out = append(out, layerColours[layers%len(layerColours)])
			layers++
			continue
		}
		out = append(out, kindColours[c.Kind])
	}
	return out
}
