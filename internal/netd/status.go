package netd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Exit codes of ditto-netd.
const (
	ExitOK       = 0 // the VM closed the socket, or SIGTERM
	ExitFailure  = 1 // anything else
	ExitUsage    = 2 // the command line is wrong
	ExitPortBusy = 3 // a forward's host port is taken
	ExitPortDeny = 4 // a forward's host port or address may not be used
)

// Status is the one line of JSON that ditto-netd writes when it is ready or
// has given up.
type Status struct {
	// Ready says that every forward listens and the socket is served.
	Ready bool `json:"ready"`
	// Addresses of the virtual network, when ready.
	Addresses
	// MTU of the virtual network in bytes, when ready.
	MTU int `json:"mtu,omitempty"`
	// Forwards that listen, with the ports that were chosen for port 0, in
	// the form of [Forward.String].
	Forwards []string `json:"forwards,omitempty"`
	// Error says what went wrong and what to do, when not ready.
	Error string `json:"error,omitempty"`
	// Code is the exit code that follows, when not ready.
	Code int `json:"code,omitempty"`
}

// StartError is why ditto-netd did not become ready.
type StartError struct {
	// Code is the exit code, one of the Exit constants.
	Code int
	// Text is one line for the user.
	Text string
}

// Error implements error.
func (e *StartError) Error() string { return e.Text }

// maxStatus bounds the status line in bytes: 64 KiB hold a thousand forwards.
const maxStatus = 64 << 10

// ReadStatus reads the status line. A process that is not ready is a
// [*StartError].
func ReadStatus(r io.Reader) (Status, error) {
	var s Status
	if err := json.NewDecoder(io.LimitReader(r, maxStatus)).Decode(&s); err != nil {
		if errors.Is(err, io.EOF) {
			err = errors.New("it ended without a word")
		}
		return Status{}, &StartError{Code: ExitFailure, Text: fmt.Sprintf("ditto-netd did not start: %v", err)}
	}
	if !s.Ready {
		return Status{}, &StartError{Code: s.Code, Text: s.Error}
	}
	return s, nil
}

// WriteStatus writes the status line.
func WriteStatus(w io.Writer, s Status) error {
	line, err := json.Marshal(s)
	if err != nil {
		return err
	}
	_, err = w.Write(append(line, '\n'))
	return err
}
