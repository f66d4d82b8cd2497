package lend

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Kinds are the errors that keep their identity on the way to the other end, by
// the names they have there. The names are of lower-case letters and "-".
type Kinds map[string]error

// canceledKind stands for context.Canceled, whatever else there is.
const canceledKind = "canceled"

// Bounds of a failure.
const (
	maxText  = 4096 // bytes
	maxKinds = 16
)

// failure is an error on its way.
type failure struct {
	Text  string   `json:"text"`
	Kinds []string `json:"kinds,omitempty"`
	Errno int      `json:"errno,omitempty"` // of the system, 0 for none
}

// maxErrno is MAX_ERRNO of Linux.
const maxErrno = 4095

func (f *failure) check() error {
	switch {
	case len(f.Text) > maxText || len(f.Kinds) > maxKinds:
		return errors.New("a failure that is too long")
	case f.Errno < 0 || f.Errno > maxErrno:
		return fmt.Errorf("the error number %d", f.Errno)
	case slices.ContainsFunc(f.Kinds, func(s string) bool { return !validName(s) }):
		return errors.New("the name of an error")
	}
	return nil
}

// pack makes a failure of an error.
func (k Kinds) pack(err error) *failure {
	f := &failure{Text: strings.Join(strings.Fields(err.Error()), " ")}
	if len(f.Text) > maxText {
		f.Text = strings.ToValidUTF8(f.Text[:maxText], "")
	}
	for _, name := range slices.Sorted(maps.Keys(k)) {
		if errors.Is(err, k[name]) && len(f.Kinds) < maxKinds {
			f.Kinds = append(f.Kinds, name)
		}
	}
	if errors.Is(err, context.Canceled) && len(f.Kinds) < maxKinds {
		f.Kinds = append(f.Kinds, canceledKind)
	}
	var errno unix.Errno
	if errors.As(err, &errno) && errno <= maxErrno {
		f.Errno = int(errno)
	}
	return f
}

// unpack makes an error of a failure. Names that are not known say nothing.
func (k Kinds) unpack(f *failure) error {
	e := &RemoteError{Text: f.Text}
	for _, name := range f.Kinds {
		if name == canceledKind {
			e.causes = append(e.causes, context.Canceled)
		} else if err, ok := k[name]; ok {
			e.causes = append(e.causes, err)
		}
	}
	if f.Errno != 0 {
		e.causes = append(e.causes, unix.Errno(f.Errno))
	}
	return e
}

// RemoteError is an error of the other end.
type RemoteError struct {
	Text   string
	causes []error
}

// Error returns what the other end said.
func (e *RemoteError) Error() string { return e.Text }

// Unwrap returns what the error was made of, as far as both ends know it.
func (e *RemoteError) Unwrap() []error { return e.causes }
