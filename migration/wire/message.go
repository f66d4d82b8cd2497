package wire

import (
	"encoding/binary"
	"fmt"
	"unicode/utf8"
)

// Capabilities are what a side can do beyond the version.
type Capabilities uint32

// The capabilities. What both have may be used.
const (
	// CanPostcopy: pages may come after the commit.
	CanPostcopy Capabilities = 1 << iota
	// CanCopyDisks: the blocks of disks may come over the wire.
	CanCopyDisks
)

// Digests are by what names are proven.
type Digests uint8

// The digests.
const (
	DigestXXH3   Digests = 1 // XXH3-128, seeded
	DigestBLAKE3 Digests = 2 // the first 16 bytes of BLAKE3
)

// DigestSize is the size of a page's digest in bytes.
const DigestSize = 16

// Limits of messages.
const (
	// MaxConnections is the most data connections of a migration.
	MaxConnections = 64
	// MaxLayers is how many layers an offer may have.
	MaxLayers = 4096
	// MaxText is the most bytes of a reason or a version.
	MaxText = 2 << 10
	// MaxSections is more than a full machine has.
	MaxSections = 64
	maxName     = 64
	// maxGFN bounds page numbers: 2^52 bytes of guest-physical address.
	maxGFN = 1 << 40
)

// Message is a frame without payload.
type Message interface {
	// Type is the frame's type.
	Type() Type
	appendHead(b []byte) []byte
	parse(d *decoder)
}

// Append appends a message's frame to b.
func Append(b []byte, m Message) []byte {
	start := len(b)
	return Finish(m.appendHead(Begin(b)), start, m.Type(), 0, 0)
}

// Parse fills m, whose type the frame has.
func Parse(f Frame, m Message) error {
	if f.Type != m.Type() {
		return bad(f.Type, "came where %q was expected", m.Type())
	}
	d := decoder{t: f.Type, b: f.Head}
	m.parse(&d)
	if d.err == nil && len(d.b) != 0 {
		d.fail("%d bytes too long", len(d.b))
	}
	return d.err
}

// decoder takes a head apart. After an error it returns zeros.
type decoder struct {
	t   Type
	b   []byte
	err error
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = bad(d.t, format, args...)
	}
	d.b = nil
}

func (d *decoder) take(n int) []byte {
	if d.err == nil && len(d.b) < n {
		d.fail("too short")
	}
	if d.err != nil {
		return make([]byte, min(n, DigestSize))
	}
	b := d.b[:n]
	d.b = d.b[n:]
	return b
}

func (d *decoder) u8() uint8   { return d.take(1)[0] }
func (d *decoder) u16() uint16 { return binary.LittleEndian.Uint16(d.take(2)) }
func (d *decoder) u32() uint32 { return binary.LittleEndian.Uint32(d.take(4)) }
func (d *decoder) u64() uint64 { return binary.LittleEndian.Uint64(d.take(8)) }

// rest returns a copy of what is left.
func (d *decoder) rest() []byte {
	b := append([]byte(nil), d.b...)
	d.b = nil
	return b
}

// text returns a text that its length precedes.
func (d *decoder) text(most int) string {
	n := int(d.u16())
	if n > most {
		d.fail("a text of %d bytes is longer than %d", n, most)
	}
	if d.err != nil {
		return ""
	}
	b := d.take(n)
	if d.err != nil || !utf8.Valid(b) {
		d.fail("a text is not UTF-8")
		return ""
	}
	return string(b)
}

// appendText appends a text, cut to what may be sent.
func appendText(b []byte, s string, most int) []byte {
	if len(s) > most {
		s = s[:most]
		for len(s) > 0 && !utf8.ValidString(s) {
			s = s[:len(s)-1]
		}
	}
	if !utf8.ValidString(s) {
		s = fmt.Sprintf("%.*q", most/8, s)
	}
	b = binary.LittleEndian.AppendUint16(b, uint16(len(s)))
	return append(b, s...)
}

// Hello says how the source will speak.
//
//	0  4  capabilities
//	4  8  seed of XXH3-128 digests
//	12 1  digests
//	13 1  zero
//	14 2  data connections
//	16 4  without a sign of life for so many milliseconds it gives up
//	20    text: version of ditto
type Hello struct {
	Capabilities Capabilities
	Seed         uint64
	Digests      Digests
	Connections  uint16
	StallMillis  uint32
	Ditto        string
}

// Type implements Message.
func (*Hello) Type() Type { return TypeHello }

func (m *Hello) appendHead(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(m.Capabilities))
	b = binary.LittleEndian.AppendUint64(b, m.Seed)
	b = append(b, byte(m.Digests), 0)
	b = binary.LittleEndian.AppendUint16(b, m.Connections)
	b = binary.LittleEndian.AppendUint32(b, m.StallMillis)
	return appendText(b, m.Ditto, MaxText)
}

func (m *Hello) parse(d *decoder) {
	m.Capabilities, m.Seed, m.Digests = Capabilities(d.u32()), d.u64(), Digests(d.u8())
	if d.u8() != 0 {
		d.fail("byte 13 is not zero")
	}
	m.Connections, m.StallMillis, m.Ditto = d.u16(), d.u32(), d.text(MaxText)
	switch {
	case m.Digests != DigestXXH3 && m.Digests != DigestBLAKE3:
		d.fail("digests %d are not known here", m.Digests)
	case m.Connections > MaxConnections:
		d.fail("%d data connections are more than %d", m.Connections, MaxConnections)
	}
}

// Offer is what the VM is, in JSON.
type Offer struct{ JSON []byte }

// Type implements Message.
func (*Offer) Type() Type { return TypeOffer }

func (m *Offer) appendHead(b []byte) []byte { return append(b, m.JSON...) }
func (m *Offer) parse(d *decoder)           { m.JSON = d.rest() }

// Accept says that the VM can come.
//
//	0  4  capabilities
//	4  4  without a sign of life for so many milliseconds it gives up
//	8     text: version of ditto
//	      bits: layer n of the offer is held here if bit n%8 of byte n/8 is set
type Accept struct {
	Capabilities Capabilities
	StallMillis  uint32
	Ditto        string
	Held         []byte
}

// Type implements Message.
func (*Accept) Type() Type { return TypeAccept }

func (m *Accept) appendHead(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(m.Capabilities))
	b = binary.LittleEndian.AppendUint32(b, m.StallMillis)
	b = appendText(b, m.Ditto, MaxText)
	return append(b, m.Held...)
}

func (m *Accept) parse(d *decoder) {
	m.Capabilities, m.StallMillis, m.Ditto = Capabilities(d.u32()), d.u32(), d.text(MaxText)
	if len(d.b) > MaxLayers/8 {
		d.fail("more than %d layers", MaxLayers)
	}
	m.Held = d.rest()
}

// Hold sets that a layer is held.
func (m *Accept) Hold(n int) {
	for len(m.Held) <= n/8 {
		m.Held = append(m.Held, 0)
	}
	m.Held[n/8] |= 1 << (n % 8)
}

// Holds tells whether a layer is held.
func (m *Accept) Holds(n int) bool { return n/8 < len(m.Held) && m.Held[n/8]>>(n%8)&1 != 0 }

// Fail ends the migration.
//
//	0  1  1 if it never began
//	1     text: why
type Fail struct {
	Refused bool
	Reason  string
}

// Type implements Message.
func (*Fail) Type() Type { return TypeFail }

func (m *Fail) appendHead(b []byte) []byte {
	return appendText(append(b, boolByte(m.Refused)), m.Reason, MaxText)
}

func (m *Fail) parse(d *decoder) { m.Refused, m.Reason = d.flag(), d.text(MaxText) }

func boolByte(v bool) byte {
	if v {
		return 1
	}
	return 0
}

// flag reads a byte that is 0 or 1.
func (d *decoder) flag() bool {
	v := d.u8()
	if v > 1 {
		d.fail("%d is neither 0 nor 1", v)
	}
	return v == 1
}

// Alive is a sign of life. Done counts what its sender has done so far, in bytes
// of memory: while it grows, the sender is not stuck.
type Alive struct{ Done uint64 }

// Type implements Message.
func (*Alive) Type() Type { return TypeAlive }

func (m *Alive) appendHead(b []byte) []byte { return binary.LittleEndian.AppendUint64(b, m.Done) }
func (m *Alive) parse(d *decoder)           { m.Done = d.u64() }

// Round begins a round.
//
//	0  4  number, from 1
//	4  1  1 if the guest stands still
//	5  3  zero
//	8  8  pages
type Round struct {
	Number  uint32
	Stopped bool
	Pages   uint64
}

// Type implements Message.
func (*Round) Type() Type { return TypeRound }

func (m *Round) appendHead(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, m.Number)
	b = append(b, boolByte(m.Stopped), 0, 0, 0)
	return binary.LittleEndian.AppendUint64(b, m.Pages)
}

func (m *Round) parse(d *decoder) {
	m.Number, m.Stopped = d.u32(), d.flag()
	if pad := d.take(3); pad[0]|pad[1]|pad[2] != 0 {
		d.fail("bytes 5 to 7 are not zero")
	}
	m.Pages = d.u64()
}

// Barrier says, on a data connection, that all its frames of a round were sent
// before it.
type Barrier struct{ Number uint32 }

// Type implements Message.
func (*Barrier) Type() Type { return TypeBarrier }

func (m *Barrier) appendHead(b []byte) []byte { return binary.LittleEndian.AppendUint32(b, m.Number) }
func (m *Barrier) parse(d *decoder)           { m.Number = d.u32() }

// RoundEnd says that every data connection has its barrier.
type RoundEnd struct{ Number uint32 }

// Type implements Message.
func (*RoundEnd) Type() Type { return TypeRoundEnd }

func (m *RoundEnd) appendHead(b []byte) []byte { return binary.LittleEndian.AppendUint32(b, m.Number) }
func (m *RoundEnd) parse(d *decoder)           { m.Number = d.u32() }

// RoundDone says that all pages of the round are in memory, but those wanted.
type RoundDone struct{ Number uint32 }

// Type implements Message.
func (*RoundDone) Type() Type { return TypeRoundDone }

func (m *RoundDone) appendHead(b []byte) []byte { return binary.LittleEndian.AppendUint32(b, m.Number) }
func (m *RoundDone) parse(d *decoder)           { m.Number = d.u32() }

// Section is a section of the VM's state.
//
//	0  4  version
//	4     text: name
//	      bytes
type Section struct {
	Name    string
	Version uint32
	Bytes   []byte
}

// Type implements Message.
func (*Section) Type() Type { return TypeSection }

func (m *Section) appendHead(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, m.Version)
	b = appendText(b, m.Name, maxName)
	return append(b, m.Bytes...)
}

func (m *Section) parse(d *decoder) { m.Version, m.Name, m.Bytes = d.u32(), d.text(maxName), d.rest() }

// VerifyChunk is the memory that one digest of [Verify] is of, in pages: a chunk
// begins at a page whose number is a multiple of it, or where memory begins.
const VerifyChunk = 512

// Verify has digests of chunks of memory, from the first page's on; the last
// chunk of a region may be shorter.
//
//	0  8  first page
//	8     16 bytes a chunk
type Verify struct {
	GFN     uint64
	Digests [][DigestSize]byte
}

// MaxVerify is how many digests a frame has at most.
const MaxVerify = (MaxHead - 8) / DigestSize

// Type implements Message.
func (*Verify) Type() Type { return TypeVerify }

func (m *Verify) appendHead(b []byte) []byte {
	b = binary.LittleEndian.AppendUint64(b, m.GFN)
	for i := range m.Digests {
		b = append(b, m.Digests[i][:]...)
	}
	return b
}

func (m *Verify) parse(d *decoder) {
	m.GFN = d.u64()
	if m.GFN >= maxGFN || len(d.b)%DigestSize != 0 || len(d.b) == 0 {
		d.fail("digests of page %#x, %d bytes", m.GFN, len(d.b))
		return
	}
	m.Digests = make([][DigestSize]byte, len(d.b)/DigestSize)
	for i := range m.Digests {
		m.Digests[i] = [DigestSize]byte(d.take(DigestSize))
	}
}

// Prepare says that everything was sent: the destination takes the disks and makes
// the VM.
//
//	0  4  sections that were sent
//	4  1  1 if pages are missing and come later (post-copy)
//	5  3  zero
type Prepare struct {
	Sections uint32
	Postcopy bool
}

// Type implements Message.
func (*Prepare) Type() Type { return TypePrepare }

func (m *Prepare) appendHead(b []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(b, m.Sections), boolByte(m.Postcopy), 0, 0, 0)
}

func (m *Prepare) parse(d *decoder) {
	m.Sections, m.Postcopy = d.u32(), d.flag()
	if pad := d.take(3); pad[0]|pad[1]|pad[2] != 0 {
		d.fail("bytes 5 to 7 are not zero")
	}
	if m.Sections > MaxSections {
		d.fail("%d sections are more than %d", m.Sections, MaxSections)
	}
}

// Ready says that the VM is made and the disks are taken.
type Ready struct{}

// Type implements Message.
func (*Ready) Type() Type { return TypeReady }

func (*Ready) appendHead(b []byte) []byte { return b }
func (*Ready) parse(*decoder)             {}

// Commit is the commit point: from its sending on the source never runs the VM
// again, unless the destination says that it never will.
type Commit struct{}

// Type implements Message.
func (*Commit) Type() Type { return TypeCommit }

func (*Commit) appendHead(b []byte) []byte { return b }
func (*Commit) parse(*decoder)             {}

// Running says that the destination has recorded the commit and lets the guest
// run. Nanos is how long the guest stood still as the destination saw it.
type Running struct{ Nanos uint64 }

// Type implements Message.
func (*Running) Type() Type { return TypeRunning }

func (m *Running) appendHead(b []byte) []byte { return binary.LittleEndian.AppendUint64(b, m.Nanos) }
func (m *Running) parse(d *decoder)           { m.Nanos = d.u64() }

// Answer is the answer on a connection of [RoleOutcome].
type Answer struct{ Outcome Outcome }

// Type implements Message.
func (*Answer) Type() Type { return TypeOutcome }

func (m *Answer) appendHead(b []byte) []byte { return append(b, byte(m.Outcome)) }

func (m *Answer) parse(d *decoder) {
	if m.Outcome = Outcome(d.u8()); m.Outcome >= outcomes {
		d.fail("outcome %d is not known here", m.Outcome)
	}
}

// Pulled says that no page is missing any more.
type Pulled struct{}

// Type implements Message.
func (*Pulled) Type() Type { return TypePulled }

func (*Pulled) appendHead(b []byte) []byte { return b }
func (*Pulled) parse(*decoder)             {}
