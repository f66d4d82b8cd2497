// Package wire is what the emulated host's agent and the process that booted it
// say to each other, over one byte stream per command (a virtio-serial port).
//
//	offset 0   u32  payload length, little-endian, at most MaxPayload
//	       4   u8   type; 0 is invalid
//	       5   u32  run number, little-endian; frames of past runs are ignored
//	       9   payload
//
//	host                                agent
//	  |------------- Start ------------->|   JSON Start
//	  |------------- Stdin ------------->|
//	  |<----------- StdinAck ------------|   one per Stdin frame, when consumed
//	  |<-------- Stdout, Stderr ---------|
//	  |---- StdinEOF, Signal, Resize --->|
//	  |<------------- Exit --------------|   JSON Exit; the port is free again
//
// At most [StdinWindow] Stdin frames are unacknowledged, so that a command that
// does not read its input cannot keep a Signal from being heard. Both ends are
// built from the same tree and started together: there is one version.
package wire

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"sync"
)

// Type says what a frame carries.
type Type uint8

// Frame types. The zero value is invalid.
const (
	Start    Type = iota + 1 // host: JSON [Command]
	Stdin                    // host: bytes for the command
	StdinEOF                 // host: no more input
	Signal                   // host: u32 signal number
	Resize                   // host: u16 rows, u16 columns
	PowerOff                 // host: unmount, then switch off; never answered
	Ready                    // agent: JSON [Hello], once on each port
	Stdout                   // agent: bytes
	Stderr                   // agent: bytes
	StdinAck                 // agent: one Stdin frame was consumed
	Exit                     // agent: JSON [Result]
	typeEnd
)

const (
	// MaxPayload bounds a frame; a Start frame carries a whole environment.
	MaxPayload = 4 << 20
	// MaxData is the most bytes that a sender puts into one Stdin, Stdout or
	// Stderr frame: Linux' virtio_console takes 32 KiB in one write.
	MaxData = 32<<10 - headerLen
	// StdinWindow is how many Stdin frames may be unacknowledged.
	StdinWindow = 8

	headerLen = 9
)

// Command is the payload of Start.
type Command struct {
	Args []string `json:"args"` // Args[0] is looked up in the PATH of Env
	Path string   `json:"path"` // file to execute instead of Args[0], if not ""
	Env  []string `json:"env"`
	Dir  string   `json:"dir"`
	// Terminal runs the command on a pseudo-terminal of the given size.
	Terminal   bool   `json:"terminal"`
	Rows, Cols uint16 `json:",omitempty"`
}

// Hello is the payload of Ready.
type Hello struct {
	// Errors are the parts of the set-up that failed without being fatal.
	Errors []string `json:"errors,omitempty"`
}

// Result is the payload of Exit.
type Result struct {
	// Code is the exit status; 128 plus the number of a signal that killed it.
	Code int `json:"code"`
	// Error is set, and the command was not run, if it could not be started.
	Error string `json:"error,omitempty"`
}

// Frame is one message.
type Frame struct {
	Type    Type
	Run     uint32
	Payload []byte
}

// Conn reads and writes frames. One goroutine may read; several may write.
type Conn struct {
	rw  io.ReadWriter
	hdr [headerLen]byte

	mu  sync.Mutex // guards writes
	buf []byte
}

// NewConn returns a Conn over rw, which it does not own.
func NewConn(rw io.ReadWriter) *Conn { return &Conn{rw: rw} }

// Read returns the next frame. Its payload is the caller's.
func (c *Conn) Read() (Frame, error) {
	if _, err := io.ReadFull(c.rw, c.hdr[:]); err != nil {
		return Frame{}, err
	}
	n := binary.LittleEndian.Uint32(c.hdr[0:])
	f := Frame{Type: Type(c.hdr[4]), Run: binary.LittleEndian.Uint32(c.hdr[5:])}
	if n > MaxPayload {
		return Frame{}, fmt.Errorf("lab wire: frame of %d bytes, at most %d are allowed", n, MaxPayload)
	}
	if f.Type == 0 || f.Type >= typeEnd {
		return Frame{}, fmt.Errorf("lab wire: unknown frame type %d", f.Type)
	}
	f.Payload = make([]byte, n)
	if _, err := io.ReadFull(c.rw, f.Payload); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return Frame{}, fmt.Errorf("lab wire: %w", err)
	}
	return f, nil
}

// Write sends one frame.
func (c *Conn) Write(t Type, run uint32, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("lab wire: frame of %d bytes, at most %d are allowed", len(payload), MaxPayload)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buf = binary.LittleEndian.AppendUint32(c.buf[:0], uint32(len(payload)))
	c.buf = append(c.buf, byte(t))
	c.buf = binary.LittleEndian.AppendUint32(c.buf, run)
	c.buf = append(c.buf, payload...)
	if _, err := c.rw.Write(c.buf); err != nil {
		return fmt.Errorf("lab wire: %w", err)
	}
	return nil
}

// WriteJSON sends one frame whose payload is v in JSON.
func (c *Conn) WriteJSON(t Type, run uint32, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("lab wire: %w", err)
	}
	return c.Write(t, run, b)
}
