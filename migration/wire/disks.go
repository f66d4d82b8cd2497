package wire

import "encoding/binary"

// MaxImages is how many images of disks a migration copies at most.
const MaxImages = 256

// NoFloor is the [Image.Floor] of an image that lies on nothing.
const NoFloor = 0xffff

// Image is an image that the destination fills: what layers of a disk hold, from
// the one at Depth (0 is the top) down to the one above Floor, which the
// destination has.
type Image struct{ Disk, Depth, Floor uint16 }

// Images says, right after [Accept], which images the destination wants. Their
// places in the list are their numbers.
//
//	0  2  disk of the offer
//	2  2  depth of the first layer whose blocks are wanted
//	4  2  depth of the layer that is there, 0xffff for none
//	6  2  zero
//	8     the next
type Images struct{ Images []Image }

// Type implements Message.
func (*Images) Type() Type { return TypeImages }

func (m *Images) appendHead(b []byte) []byte {
	for _, i := range m.Images {
		b = binary.LittleEndian.AppendUint16(b, i.Disk)
		b = binary.LittleEndian.AppendUint16(b, i.Depth)
		b = binary.LittleEndian.AppendUint16(b, i.Floor)
		b = append(b, 0, 0)
	}
	return b
}

func (m *Images) parse(d *decoder) {
	if n := len(d.b) / 8; n > MaxImages {
		d.fail("%d images are more than %d", n, MaxImages)
		return
	}
	for len(d.b) > 0 && d.err == nil {
		i := Image{d.u16(), d.u16(), d.u16()}
		if d.u16() != 0 || i.Floor <= i.Depth {
			d.fail("image %+v of a disk", i)
			return
		}
		m.Images = append(m.Images, i)
	}
}

// ImageEnd says that what an image holds was sent once; what is written to it
// since follows.
//
//	0  2  image
type ImageEnd struct{ Image uint16 }

// Type implements Message.
func (*ImageEnd) Type() Type { return TypeImageEnd }

func (m *ImageEnd) appendHead(b []byte) []byte { return binary.LittleEndian.AppendUint16(b, m.Image) }
func (m *ImageEnd) parse(d *decoder)           { m.Image = d.u16() }

// ImageDone says that the image is there, and proven if nobody writes it.
//
//	0  2  image
type ImageDone struct{ Image uint16 }

// Type implements Message.
func (*ImageDone) Type() Type { return TypeImageDone }

func (m *ImageDone) appendHead(b []byte) []byte { return binary.LittleEndian.AppendUint16(b, m.Image) }
func (m *ImageDone) parse(d *decoder)           { m.Image = d.u16() }

// Blocks is a range of an image: bytes, which are the payload, or zeros.
//
//	 0  2  image
//	 2  1  1 for zeros, which have no payload
//	 3  5  zero
//	 8  8  offset in the disk
//	16  8  length
//	24 16  digest of the payload; zero for zeros
type Blocks struct {
	Image  uint16
	Zeros  bool
	Offset uint64
	Length uint64
	Digest [DigestSize]byte
}

// blocksSize is the size of a head of [Blocks].
const blocksSize = 24 + DigestSize

// maxDisk bounds where blocks end, in bytes.
const maxDisk = 1 << 62

// AppendBlocks appends header and head; the payload is sent after it.
func AppendBlocks(b []byte, m Blocks, payload int) []byte {
	start := len(b)
	b = binary.LittleEndian.AppendUint16(Begin(b), m.Image)
	b = append(b, boolByte(m.Zeros), 0, 0, 0, 0, 0)
	b = binary.LittleEndian.AppendUint64(b, m.Offset)
	b = binary.LittleEndian.AppendUint64(b, m.Length)
	b = append(b, m.Digest[:]...)
	return Finish(b, start, TypeBlocks, 0, payload)
}

// ParseBlocks takes a [TypeBlocks] frame apart.
func ParseBlocks(f Frame) (m Blocks, err error) {
	if f.Type != TypeBlocks || f.Flags != 0 || len(f.Head) != blocksSize {
		return m, bad(f.Type, "is no range of an image")
	}
	d := decoder{t: f.Type, b: f.Head}
	m.Image, m.Zeros = d.u16(), d.flag()
	for _, pad := range d.take(5) {
		if pad != 0 {
			d.fail("bytes 3 to 7 are not zero")
		}
	}
	m.Offset, m.Length = d.u64(), d.u64()
	m.Digest = [DigestSize]byte(d.take(DigestSize))
	switch {
	case m.Image >= MaxImages:
		d.fail("image %d is more than %d", m.Image, MaxImages)
	case m.Length == 0 || m.Offset > maxDisk || m.Length > maxDisk-m.Offset:
		d.fail("%#x bytes at %#x", m.Length, m.Offset)
	case m.Zeros && (f.Payload != 0 || m.Digest != [DigestSize]byte{}):
		d.fail("zeros with a payload")
	case !m.Zeros && m.Length != uint64(f.Payload):
		d.fail("%d bytes for a length of %d", f.Payload, m.Length)
	}
	return m, d.err
}
