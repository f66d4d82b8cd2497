package api

import (
	"context"
	"errors"
	"time"
)

// ErrWrongState is wrapped when the machine's state does not allow the request.
var ErrWrongState = errors.New("not possible in this state")

// ErrNotSupported is wrapped when the machine lacks what the request needs.
var ErrNotSupported = errors.New("not supported by this machine")

// Machine is what the API controls. Its methods may be called from any
// goroutine.
type Machine interface {
	Info() Info
	Stats() (Stats, error)
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	// PowerButton presses the button and returns.
	PowerButton() error
	// Stop presses the power button, waits for at most grace and kills. It
	// returns when the machine has ended, or with the context's error.
	Stop(ctx context.Context, grace time.Duration) error
	// Kill ends the machine without waiting for it.
	Kill()
	// Balloon fails with [ErrNotSupported] if there is none.
	Balloon() (Balloon, error)
	SetBalloon(bytes uint64) error
	Forwards() []Forward
	// ConsoleResize tells the guest the size of the terminal, in characters,
	// if its console has a way to.
	ConsoleResize(columns, rows uint16)
}
