package wire

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/zeebo/xxh3"
)

// Type is what a frame is.
type Type uint8

// The types. Zero is invalid. S is the source and D the destination.
const (
	TypeHello      Type = 1 + iota // S: how it will speak
	TypeOffer                      // S: what the VM is, in JSON
	TypeAccept                     // D: the VM can come
	TypeFail                       // both: no, or no longer
	TypeAlive                      // both: a sign of life
	TypeRound                      // S: a round begins
	TypeZero                       // S, pages: zeros
	TypeNames                      // S, pages: blocks of layers
	TypeDuplicates                 // S, pages: other pages
	TypeRaw                        // S, pages: bytes
	TypeZstd                       // S, pages: compressed bytes
	TypeBarrier                    // S, on each data connection: it has all of the round
	TypeRoundEnd                   // S: every data connection has its barrier
	TypeWant                       // D: pages whose names did not hold
	TypeRoundDone                  // D: the round is in memory, except what was wanted
	TypeSection                    // S: a section of the VM's state
	TypeVerify                     // S: digests of all memory
	TypePrepare                    // S: take the disks, make the VM
	TypeReady                      // D: it is made
	TypeCommit                     // S: the commit point
	TypeRunning                    // D: the outcome is recorded, the guest runs
	TypeOutcome                    // D: the answer on a connection that asks for it
	TypeMissing                    // S: pages that come after the commit (post-copy)
	TypeRequest                    // D: pages that somebody waits for (post-copy)
	TypePulled                     // D: nothing is missing any more (post-copy)
	TypeImages                     // D: images of disks that it wants
	TypeBlocks                     // S: a range of an image
	TypeImageEnd                   // S: an image was sent once
	TypeImageDone                  // D: it is there
	types
)

// HeaderSize is the size of a frame's header in bytes.
//
//	 0  4  magic "dmf1"
//	 4  1  type
//	 5  1  flags
//	 6  2  zero
//	 8  4  bytes of head
//	12  4  bytes of payload
//	16  8  XXH3-64 of the head, seeded with the XXH3-64 of bytes 0 to 15
const HeaderSize = 24

const frameMagic = 'd' | 'm'<<8 | 'f'<<16 | '1'<<24

// Limits of what a frame may hold.
const (
	PageSize = 4096
	// MaxBatch is how many pages a frame has bytes of, at most.
	MaxBatch = 256
	// MaxPayload is the most bytes of a payload.
	MaxPayload = MaxBatch * PageSize
	// MaxHead is the most bytes of a head that describes pages.
	MaxHead = 64 << 10
	// MaxOffer and MaxSection hold the state of the largest VM (migration/state).
	MaxOffer   = 4 << 20
	MaxSection = 2 << 20
	maxSmall   = 4 << 10
)

// FlagSum says that the head begins with a checksum of the payload; without it
// the first eight bytes are zero, and the transport is trusted.
const FlagSum = 1

// limit is what a type's frames may hold, in bytes.
type limit struct{ head, payload uint32 }

var limits = [types]limit{
	TypeHello:      {maxSmall, 0},
	TypeOffer:      {MaxOffer, 0},
	TypeAccept:     {maxSmall, 0},
	TypeFail:       {maxSmall, 0},
	TypeAlive:      {8, 0},
	TypeRound:      {16, 0},
	TypeZero:       {MaxHead, 0},
	TypeNames:      {MaxHead, 0},
	TypeDuplicates: {MaxHead, 0},
	TypeRaw:        {MaxHead, MaxPayload},
	TypeZstd:       {MaxHead, MaxPayload},
	TypeBarrier:    {4, 0},
	TypeRoundEnd:   {4, 0},
	TypeWant:       {MaxHead, 0},
	TypeRoundDone:  {4, 0},
	TypeSection:    {MaxSection, 0},
	TypeVerify:     {MaxHead, 0},
	TypePrepare:    {8, 0},
	TypeReady:      {0, 0},
	TypeCommit:     {0, 0},
	TypeRunning:    {8, 0},
	TypeOutcome:    {1, 0},
	TypeMissing:    {MaxHead, 0},
	TypeRequest:    {MaxHead, 0},
	TypePulled:     {0, 0},
	TypeImages:     {maxSmall, 0},
	TypeBlocks:     {blocksSize, MaxPayload},
	TypeImageEnd:   {2, 0},
	TypeImageDone:  {2, 0},
}

var typeNames = [types]string{
	"", "hello", "offer", "accept", "fail", "alive", "round", "zero", "names", "duplicates", "raw", "zstd", "barrier",
	"round end", "want", "round done", "section", "verify", "prepare", "ready", "commit", "running", "outcome",
	"missing", "request", "pulled", "images", "blocks", "image end", "image done",
}

// String returns the type's name.
func (t Type) String() string {
	if t == 0 || t >= types {
		return fmt.Sprintf("type %d", uint8(t))
	}
	return typeNames[t]
}

// ErrFormat is wrapped by the error for bytes that are no frame or message.
var ErrFormat = errors.New("garbled")

// Error is a frame that cannot be used.
type Error struct {
	Type Type
	What string
}

// Error implements error.
func (e *Error) Error() string { return fmt.Sprintf("migration message %q: %s", e.Type, e.What) }

// Unwrap returns [ErrFormat].
func (e *Error) Unwrap() error { return ErrFormat }

func bad(t Type, format string, args ...any) error { return &Error{t, fmt.Sprintf(format, args...)} }

// Begin appends room for a header; the head follows, and then [Finish].
func Begin(b []byte) []byte { return append(b, make([]byte, HeaderSize)...) }

// Finish fills in the header of the frame that begins at start and whose head
// reaches to the end of b. The payload, if any, is sent after b.
func Finish(b []byte, start int, t Type, flags uint8, payload int) []byte {
	h, head := b[start:start+HeaderSize], b[start+HeaderSize:]
	binary.LittleEndian.PutUint32(h, frameMagic)
	h[4], h[5], h[6], h[7] = byte(t), flags, 0, 0
	binary.LittleEndian.PutUint32(h[8:], uint32(len(head)))
	binary.LittleEndian.PutUint32(h[12:], uint32(payload))
	binary.LittleEndian.PutUint64(h[16:], sum(h, head))
	return b
}

// sum is the checksum of a frame.
func sum(header, head []byte) uint64 { return xxh3.HashSeed(head, xxh3.Hash(header[:16])) }

// Frame is a frame that was read, without its payload.
type Frame struct {
	Type  Type
	Flags uint8
	// Head is valid until the next frame is read.
	Head []byte
	// Payload is how many bytes of it follow.
	Payload int
}

// Reader reads frames.
type Reader struct {
	r      *bufio.Reader
	header [HeaderSize]byte
	head   []byte
	left   int // bytes of the last frame's payload that were not read
}

// readBuffer is large enough for pages that lie scattered to be read many at a
// time, and small enough for long runs to be read where they belong.
const readBuffer = 64 << 10

// NewReader returns a reader of frames from r.
func NewReader(r io.Reader) *Reader { return &Reader{r: bufio.NewReaderSize(r, readBuffer)} }

// Next reads the next frame's header and head. The payload of the one before has
// been read. At the end of the connection, between frames, it returns io.EOF.
func (r *Reader) Next() (Frame, error) {
	if r.left != 0 {
		return Frame{}, fmt.Errorf("%d bytes of a payload were not read", r.left)
	}
	h := r.header[:]
	if _, err := io.ReadFull(r.r, h); err != nil {
		return Frame{}, err
	}
	f := Frame{Type: Type(h[4]), Flags: h[5]}
	head, payload := binary.LittleEndian.Uint32(h[8:]), binary.LittleEndian.Uint32(h[12:])
	if err := checkHeader(h, f, head, payload); err != nil {
		return Frame{}, err
	}
	if uint32(cap(r.head)) < head {
		r.head = make([]byte, head)
	}
	f.Head, f.Payload = r.head[:head], int(payload)
	if _, err := io.ReadFull(r.r, f.Head); err != nil {
		return Frame{}, noEOF(err)
	}
	if sum(h, f.Head) != binary.LittleEndian.Uint64(h[16:]) {
		return Frame{}, bad(f.Type, "wrong checksum")
	}
	r.left = f.Payload
	return f, nil
}

// checkHeader refuses headers before anything is allocated for them.
func checkHeader(h []byte, f Frame, head, payload uint32) error {
	switch {
	case binary.LittleEndian.Uint32(h) != frameMagic:
		return bad(f.Type, "does not begin as one")
	case f.Type == 0 || f.Type >= types:
		return bad(f.Type, "is not known here")
	case f.Flags&^FlagSum != 0 || h[6]|h[7] != 0:
		return bad(f.Type, "flags %#x are not known here", f.Flags)
	case f.Flags != 0 && limits[f.Type].payload == 0:
		return bad(f.Type, "has flags %#x", f.Flags)
	case head > limits[f.Type].head || payload > limits[f.Type].payload:
		return bad(f.Type, "%d and %d bytes are more than %d and %d", head, payload, limits[f.Type].head, limits[f.Type].payload)
	}
	return nil
}

// ReadPayload fills p with the next bytes of the last frame's payload.
func (r *Reader) ReadPayload(p []byte) error {
	if len(p) > r.left {
		return fmt.Errorf("%d bytes of payload asked for, %d are left", len(p), r.left)
	}
	n, err := io.ReadFull(r.r, p)
	r.left -= n
	return noEOF(err)
}

// noEOF makes an end in the middle of a frame what it is.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
