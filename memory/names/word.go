package names

// word is what the [Table] keeps for a page: its name, or that I/O has it.
//
//	named    63..61 Block  60 proven   59..48 layer  47 proving       43..0 block
//	reading  63..61 5                  59..48 layer  46..45 reported  43..0 block
//	writing  63..61 6                  59..48 layer                   43..0 block
//	busy     63..61 7      60 tainted  55..28 writes in flight        27..0 reads in flight
//
// A page that is not of these is nothing, and 0. Named, reading and writing
// pages stand in the chain of their block, so that whatever happens to the block
// finds them; busy ones do not. See io.go for how a page goes from one to the
// other.
type word uint64

const (
	kindNamed   = word(Block) << kindShift
	kindReading = word(5) << kindShift
	kindWriting = word(6) << kindShift
	kindBusy    = word(7) << kindShift
	kindMask    = word(7) << kindShift

	provenWord  = word(provenBit)
	provingBit  = word(1) << 47
	reportUnit  = word(1) << 45
	reportMask  = word(3) << 45
	taintedBit  = word(1) << 60
	oneRead     = word(1)
	oneWrite    = word(1) << 28
	inFlight    = word(1)<<56 - 1
	blockBits   = 44
	blockMask   = word(1)<<blockBits - 1
	keyMask     = word(layerMask)<<layerShift | blockMask
	vouchedMask = provenWord | provingBit
)

// key is a block of a layer: the bits of a word that say so.
type key word

func makeKey(l LayerID, block uint64) key {
	return key(word(l&layerMask)<<layerShift | word(block)&blockMask)
}

func (k key) layer() LayerID { return LayerID(k >> layerShift & layerMask) }
func (k key) block() uint64  { return uint64(word(k) & blockMask) }

func (w word) kind() word { return w & kindMask }
func (w word) key() key   { return key(w & keyMask) }

// chained reports whether the page stands in the chain of its key.
func (w word) chained() bool {
	k := w.kind()
	return k == kindNamed || k == kindReading || k == kindWriting
}

// vouched reports whether a named page is proven or being proven.
func (w word) vouched() bool { return w.kind() == kindNamed && w&vouchedMask != 0 }

// name returns what others may know of the page.
func (w word) name() Name {
	if w.kind() != kindNamed {
		return 0
	}
	return Name(w &^ (provingBit | reportMask))
}

// spoilt is the page of one read or write in flight, or a busy one, after
// something happened to page or block that forbids to record it.
func (w word) spoilt() word {
	switch w.kind() {
	case kindReading:
		return kindBusy | taintedBit | oneRead
	case kindWriting:
		return kindBusy | taintedBit | oneWrite
	case kindBusy:
		return w | taintedBit
	}
	return 0
}
