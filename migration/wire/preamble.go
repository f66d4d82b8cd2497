package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/zeebo/xxh3"
)

// Versions of the protocol that this code speaks.
const (
	Version    = 1
	MinVersion = 1
)

// magic begins preamble and welcome: a byte that is not ASCII, so that no text
// protocol begins like it, and a line end, which text transfers would change.
var magic = [8]byte{0x93, 'D', 'I', 'T', 'T', 'O', 'M', '\n'}

// Errors of connections that are none of this protocol, or of none that is spoken
// here.
var (
	ErrNotDitto = errors.New("the other side does not speak ditto's migration protocol")
	ErrVersion  = errors.New("no version of the migration protocol in common")
)

// Role is what a connection is for.
type Role uint16

// The roles. Zero is invalid.
const (
	RoleControl Role = 1 + iota // messages; a migration has one
	RoleData                    // pages
	RoleOutcome                 // the question what became of a migration
	RolePull                    // post-copy goes on after the network was lost
	roles
)

// Sizes in bytes.
const (
	PreambleSize = 40
	WelcomeSize  = 24
)

// Preamble is what a source says first on each connection.
//
//	 0  8  magic
//	 8  2  lowest version spoken
//	10  2  highest
//	12  2  role
//	14  2  number of a data connection, from 0; of others 0
//	16 16  token
//	32  8  XXH3-64 of the bytes before
type Preamble struct {
	Min, Max uint16
	Role     Role
	Index    uint16
	Token    Token
}

// Append appends the preamble's bytes.
func (p Preamble) Append(b []byte) []byte {
	start := len(b)
	b = append(b, magic[:]...)
	b = binary.LittleEndian.AppendUint16(b, p.Min)
	b = binary.LittleEndian.AppendUint16(b, p.Max)
	b = binary.LittleEndian.AppendUint16(b, uint16(p.Role))
	b = binary.LittleEndian.AppendUint16(b, p.Index)
	b = append(b, p.Token[:]...)
	return binary.LittleEndian.AppendUint64(b, xxh3.Hash(b[start:]))
}

// ReadPreamble reads a preamble and no byte more. It stops at the first bytes
// that are none of one.
func ReadPreamble(r io.Reader) (Preamble, error) {
	var b [PreambleSize]byte
	if err := readGreeting(r, b[:]); err != nil {
		return Preamble{}, err
	}
	p := Preamble{
		Min:   binary.LittleEndian.Uint16(b[8:]),
		Max:   binary.LittleEndian.Uint16(b[10:]),
		Role:  Role(binary.LittleEndian.Uint16(b[12:])),
		Index: binary.LittleEndian.Uint16(b[14:]),
		Token: Token(b[16:32]),
	}
	switch {
	case p.Min == 0 || p.Max < p.Min:
		return Preamble{}, fmt.Errorf("%w: versions %d to %d", ErrNotDitto, p.Min, p.Max)
	case p.Role == 0 || p.Role >= roles:
		return Preamble{}, fmt.Errorf("%w: role %d", ErrNotDitto, p.Role)
	case p.Role != RoleData && p.Index != 0:
		return Preamble{}, fmt.Errorf("%w: role %d with number %d", ErrNotDitto, p.Role, p.Index)
	}
	return p, nil
}

// readGreeting fills b, whose first bytes are the magic and whose last eight the
// checksum of the rest.
func readGreeting(r io.Reader, b []byte) error {
	if _, err := io.ReadFull(r, b[:len(magic)]); err != nil {
		return err
	}
	if [8]byte(b) != magic {
		return ErrNotDitto
	}
	if _, err := io.ReadFull(r, b[len(magic):]); err != nil {
		return err
	}
	end := len(b) - 8
	if xxh3.Hash(b[:end]) != binary.LittleEndian.Uint64(b[end:]) {
		return fmt.Errorf("%w: wrong checksum of its first bytes", ErrNotDitto)
	}
	return nil
}

// Choose returns the highest version that both sides speak, of which this one
// speaks min to max.
func (p Preamble) Choose(minimum, maximum uint16) (uint16, error) {
	v := min(p.Max, maximum)
	if v < p.Min || v < minimum {
		return 0, versionError(p.Min, p.Max, minimum, maximum)
	}
	return v, nil
}

func versionError(theirMin, theirMax, min, max uint16) error {
	advice := "update ditto there"
	if theirMin > max {
		advice = "update ditto here"
	}
	return fmt.Errorf("%w: the other side speaks %d to %d, this one %d to %d; %s", ErrVersion, theirMin, theirMax, min, max, advice)
}

// Status is the answer to a preamble.
type Status uint16

// The answers.
const (
	StatusOK        Status = iota
	StatusVersion          // no version in common
	StatusBusy             // another migration is under way
	StatusUnknown          // a data connection of no migration
	StatusNoReceive        // nobody receives here, only outcomes are told
	statuses
)

var statusTexts = [statuses]string{
	"ok", "no version in common", "another VM is being received", "no such migration", "nobody receives a VM here now",
}

// String says it for people.
func (s Status) String() string {
	if s >= statuses {
		return fmt.Sprintf("status %d", uint16(s))
	}
	return statusTexts[s]
}

// Welcome is the answer to a [Preamble].
//
//	 0  8  magic
//	 8  2  lowest version spoken
//	10  2  highest
//	12  2  the version that is spoken from now on, 0 with another status than 0
//	14  2  status
//	16  8  XXH3-64 of the bytes before
type Welcome struct {
	Min, Max uint16
	Chosen   uint16
	Status   Status
}

// Append appends the welcome's bytes.
func (w Welcome) Append(b []byte) []byte {
	start := len(b)
	b = append(b, magic[:]...)
	b = binary.LittleEndian.AppendUint16(b, w.Min)
	b = binary.LittleEndian.AppendUint16(b, w.Max)
	b = binary.LittleEndian.AppendUint16(b, w.Chosen)
	b = binary.LittleEndian.AppendUint16(b, uint16(w.Status))
	return binary.LittleEndian.AppendUint64(b, xxh3.Hash(b[start:]))
}

// ReadWelcome reads the answer to a preamble that offered min to max. What is no
// welcome, or not friendly, is an error.
func ReadWelcome(r io.Reader, minimum, maximum uint16) (Welcome, error) {
	var b [WelcomeSize]byte
	if err := readGreeting(r, b[:]); err != nil {
		return Welcome{}, err
	}
	w := Welcome{
		Min:    binary.LittleEndian.Uint16(b[8:]),
		Max:    binary.LittleEndian.Uint16(b[10:]),
		Chosen: binary.LittleEndian.Uint16(b[12:]),
		Status: Status(binary.LittleEndian.Uint16(b[14:])),
	}
	switch {
	case w.Status == StatusVersion:
		return Welcome{}, versionError(w.Min, w.Max, minimum, maximum)
	case w.Status != StatusOK:
		return Welcome{}, &StatusError{w.Status}
	case w.Chosen < minimum || w.Chosen > maximum:
		return Welcome{}, fmt.Errorf("%w: it chose version %d of %d to %d", ErrNotDitto, w.Chosen, minimum, maximum)
	}
	return w, nil
}

// StatusError is a welcome that is none.
type StatusError struct{ Status Status }

// Error implements error.
func (e *StatusError) Error() string { return "the other side refused: " + e.Status.String() }
