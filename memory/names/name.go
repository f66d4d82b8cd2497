package names

import "fmt"

// Kind is what sort of thing a page equals.
type Kind uint8

// The kinds. The zero value names nothing.
const (
	// None: nothing is known to equal the page.
	None Kind = iota
	// Zero: the page is all zeros, or not populated.
	Zero
	// Block: the page equals a block of a layer.
	Block
	// Page: the page equals another page of the same VM, the one with the
	// lowest number among its equals.
	Page
	// Parent: the page equals the same page of a parent snapshot.
	Parent
)

// String returns none, zero, block, page or parent.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

var kindNames = [...]string{"none", "zero", "block", "page", "parent"}

// Name is what one page equals, in eight bytes. The zero value names nothing.
//
//	63..61  kind
//	60      proven
//	59..48  layer
//	47..0   block of the layer, or page frame number
type Name uint64

const (
	kindShift   = 61
	provenBit   = 1 << 60
	layerShift  = 48
	layerMask   = 1<<12 - 1
	numberMask  = 1<<48 - 1
	maxNumber   = numberMask
	payloadMask = 1<<60 - 1
)

// MaxLayers is how many layers names can number.
const MaxLayers = layerMask + 1

// ZeroPage is the name of a page of zeros.
const ZeroPage = Name(Zero) << kindShift

// OfBlock names a block of a layer.
func OfBlock(l LayerID, block uint64) Name {
	return Name(Block)<<kindShift | Name(l&layerMask)<<layerShift | Name(block&numberMask)
}

// OfPage names another page by its frame number.
func OfPage(gfn uint64) Name { return Name(Page)<<kindShift | Name(gfn&numberMask) }

// Kind returns what sort of thing is named.
func (n Name) Kind() Kind { return Kind(n >> kindShift) }

// Layer returns the layer of a [Block].
func (n Name) Layer() LayerID { return LayerID(n >> layerShift & layerMask) }

// Number returns the block of a [Block], or the frame number of a [Page].
func (n Name) Number() uint64 { return uint64(n & numberMask) }

// Proven reports whether the page was compared with what it is named after and
// found equal. A name in a [Table] that is not proven is provisional: what I/O
// suggests.
func (n Name) Proven() bool { return n&provenBit != 0 }

// AsProven returns the name, proven.
func (n Name) AsProven() Name { return n | provenBit }

// String describes the name for people.
func (n Name) String() string {
	switch n.Kind() {
	case Block:
		return fmt.Sprintf("block(%d, %d)", n.Layer(), n.Number())
	case Page:
		return fmt.Sprintf("page(%#x)", n.Number())
	}
	return n.Kind().String()
}
