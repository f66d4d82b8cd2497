package terminal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// Result is how a session ended.
type Result int

// The results.
const (
	Ended    Result = iota // the machine ended
	Detached               // the user left; the machine runs on
)

// Session joins a terminal to a console until one of them ends it.
type Session struct {
	// Stdin is read key by key, in raw mode if it is a terminal.
	Stdin *os.File
	// Stdout gets what the guest writes.
	Stdout io.Writer
	// Notice gets ditto's own words, nil for none.
	Notice io.Writer
	// Stop is called for Ctrl-a x, with how often it was pressed before.
	Stop func(times int)
	// Resize is called with the terminal's size at the start and whenever it
	// changes. It may be nil.
	Resize func(columns, rows uint16)
	// Keys tells whether Ctrl-a commands are understood. They are when Stdin
	// is a terminal.
	Keys bool
}

// errDetach ends a session from within.
var errDetach = errors.New("detached")

// Run joins the session to the console connection until the console ends, the
// user detaches, or ctx ends. It closes the connection. The terminal is
// restored before it returns.
func (s Session) Run(ctx context.Context, console net.Conn) (Result, error) {
	defer console.Close()
	restore, err := makeRaw(s.Stdin)
	if err != nil {
		return Ended, err
	}
	defer restore()
	// A signal that would end ditto must not leave the terminal raw.
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()

	wakeRead, wakeWrite, err := os.Pipe()
	if err != nil {
		return Ended, fmt.Errorf("terminal: %w", err)
	}
	defer wakeRead.Close()

	resized := make(chan os.Signal, 1)
	signal.Notify(resized, unix.SIGWINCH)
	defer signal.Stop(resized)
	s.resize()

	var typedErr, shownErr error // valid when typed and shown are closed
	typed, shown := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(typed)
		typedErr = s.pumpKeys(wakeRead, console)
	}()
	go func() {
		defer close(shown)
		_, shownErr = io.Copy(s.Stdout, console)
	}()
	defer func() {
		_ = console.Close()
		_ = wakeWrite.Close()
		<-shown
		<-typed
	}()

	for typing := typed; ; {
		select {
		case <-typing:
			if errors.Is(typedErr, errDetach) {
				return Detached, nil
			}
			if typedErr != nil {
				return Ended, typedErr
			}
			typing = nil // the end of the input is not the end of the session
		case <-shown:
			if errors.Is(shownErr, unix.ECONNRESET) {
				// The machine ended with keys that it had not read.
				shownErr = nil
			}
			return Ended, shownErr
		case <-resized:
			s.resize()
		case <-ctx.Done():
			return Detached, ctx.Err()
		}
	}
}

// pumpKeys sends what is typed to the guest until the input or the session ends.
func (s Session) pumpKeys(wake *os.File, console io.Writer) error {
	var keys Keys
	quits := 0
	return readInput(s.Stdin, wake, func(input []byte) error {
		for rest := input; len(rest) > 0; {
			guest, command := rest, None
			if s.Keys {
				guest, command, rest = keys.Next(rest)
			} else {
				rest = nil
			}
			if len(guest) > 0 {
				if _, err := console.Write(guest); err != nil {
					return io.EOF // the console has ended, which the other side reports
				}
			}
			switch command {
			case Detach:
				return errDetach
			case Quit:
				s.Stop(quits)
				quits++
			case Help:
				s.notify(HelpText)
			}
		}
		return nil
	})
}

// resize reports the size of the terminal, if there is one.
func (s Session) resize() {
	if s.Resize == nil {
		return
	}
	columns, rows, err := term.GetSize(int(s.Stdin.Fd()))
	if err != nil || columns <= 0 || rows <= 0 || columns > 0xffff || rows > 0xffff {
		return
	}
	s.Resize(uint16(columns), uint16(rows))
}

func (s Session) notify(text string) {
	if s.Notice != nil {
		fmt.Fprintf(s.Notice, "\r\n[ditto: %s]\r\n", text)
	}
}

// makeRaw puts f into raw mode if it is a terminal and returns what undoes it.
func makeRaw(f *os.File) (restore func(), err error) {
	fd := int(f.Fd())
	if !term.IsTerminal(fd) {
		return func() {}, nil
	}
	state, err := term.MakeRaw(fd)
	if err != nil {
		return nil, fmt.Errorf("terminal: %w", err)
	}
	return func() { _ = term.Restore(fd, state) }, nil
}
