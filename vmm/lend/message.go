package lend

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Version of the protocol.
const Version = 1

// Bounds of what is sent and received.
const (
	// MaxMessage bounds a message in bytes. It holds the paths of as many disks
	// as a machine can have.
	MaxMessage = 192 << 10
	// MaxFiles bounds the descriptors of an answer, and of an end.
	MaxFiles = 4
	// MaxName bounds the names of operations and of what is asked.
	MaxName = 32
)

// ErrProtocol is wrapped when the other end does not keep to the protocol.
var ErrProtocol = errors.New("the other end does not keep to the protocol")

// kind says what a message is.
type kind string

const (
	kindHello  kind = "hello"  // client: the operation begins
	kindAsk    kind = "ask"    // machine: do this for me
	kindAnswer kind = "answer" // client: done, or why not
	kindCancel kind = "cancel" // client: undo it
	kindEvent  kind = "event"  // machine: how far it is
	kindEnd    kind = "end"    // machine: the operation has ended
)

// message is what a packet holds.
type message struct {
	Kind    kind            `json:"kind"`
	Version int             `json:"version,omitempty"` // of hello
	ID      uint64          `json:"id,omitempty"`      // joins an answer with what was asked
	Name    string          `json:"name,omitempty"`    // of the operation, or of what is asked
	Body    json.RawMessage `json:"body,omitempty"`
	Files   int             `json:"files,omitempty"` // descriptors that come with an answer, or with an end
	Failure *failure        `json:"failure,omitempty"`
}

// parts are the members that a message of a kind may have.
type parts struct{ version, id, name, body, files, failure bool }

var allowed = map[kind]parts{
	kindHello:  {version: true, name: true, body: true},
	kindAsk:    {id: true, name: true, body: true},
	kindAnswer: {id: true, body: true, files: true, failure: true},
	kindCancel: {},
	kindEvent:  {body: true},
	kindEnd:    {body: true, files: true, failure: true},
}

// newMessage returns a message whose body is v as JSON, without one for nil.
func newMessage(k kind, v any) (message, error) {
	m := message{Kind: k}
	if v == nil {
		return m, nil
	}
	body, err := json.Marshal(v)
	if err != nil {
		return m, fmt.Errorf("%s: %w", k, err)
	}
	m.Body = body
	return m, nil
}

// encode returns the bytes of a message.
func (m *message) encode() ([]byte, error) {
	b, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m.Kind, err)
	}
	if len(b) > MaxMessage {
		return nil, fmt.Errorf("%s: a message of %d bytes is longer than %d", m.Kind, len(b), MaxMessage)
	}
	return b, nil
}

// decode reads a message that came with so many descriptors, and checks all of
// it.
func decode(b []byte, files int) (message, error) {
	var m message
	if len(b) > MaxMessage {
		return m, fmt.Errorf("%w: a message of more than %d bytes", ErrProtocol, MaxMessage)
	}
	// Of another version nothing else may be as it is now.
	var hello struct {
		Kind    kind `json:"kind"`
		Version int  `json:"version"`
	}
	if err := json.Unmarshal(b, &hello); err != nil {
		return m, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	if hello.Kind == kindHello && hello.Version != Version {
		return m, fmt.Errorf("%w: version %d, and this process speaks %d: use the ditto that the machine was started with", ErrProtocol, hello.Version, Version)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil {
		return m, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return m, fmt.Errorf("%w: something follows a message", ErrProtocol)
	}
	if err := m.check(files); err != nil {
		return m, fmt.Errorf("%w: %s: %w", ErrProtocol, m.Kind, err)
	}
	return m, nil
}

// check checks a message against its kind.
func (m *message) check(files int) error {
	may, known := allowed[m.Kind]
	switch {
	case !known:
		return errors.New("an unknown kind of message")
	case !may.version && m.Version != 0 || !may.id && m.ID != 0 || !may.name && m.Name != "" ||
		!may.body && m.Body != nil || !may.files && m.Files != 0 || !may.failure && m.Failure != nil:
		return errors.New("it has a member that it cannot have")
	case may.id && m.ID == 0:
		return errors.New("it has no number")
	case may.name && !validName(m.Name):
		return fmt.Errorf("the name %.40q", m.Name)
	case m.Files != files || files < 0 || files > MaxFiles:
		return fmt.Errorf("it says %d descriptors and comes with %d", m.Files, files)
	case m.Failure != nil && (m.Body != nil || files > 0):
		return errors.New("it has failed and has not")
	case m.Failure != nil:
		return m.Failure.check()
	}
	return nil
}

// validName reports whether s names an operation, or what is asked in one.
func validName(s string) bool {
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && c != '-' {
			return false
		}
	}
	return s != "" && len(s) <= MaxName
}
