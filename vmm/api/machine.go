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
	// TakeBack lets a machine run on whose migration is in doubt. It fails with
	// [ErrWrongState] if none is.
	TakeBack(ctx context.Context) error
	// PowerButton presses the button and returns.
	PowerButton() error
	// Stop presses the power button, waits for at most grace and kills. It
	// returns when the machine has ended, or with the context's error.
	Stop(ctx context.Context, grace time.Duration) error
	// Kill ends the machine without waiting for it.
	Kill()
	// Memory says what the guest's memory equals and how it is mapped. A full
	// answer takes until it is there or ctx ends.
	Memory(ctx context.Context, q MemoryQuery) (Memory, error)
	// MemoryMap says the same place by place.
	MemoryMap(ctx context.Context, q MemoryQuery) (MemoryMap, error)
	// Balloon fails with [ErrNotSupported] if there is none.
	Balloon() (Balloon, error)
	SetBalloon(bytes uint64) error
	// ResizeDisk changes the size of the nth disk; a smaller one loses its end.
	ResizeDisk(n int, bytes uint64) error
	Forwards() []Forward
	// ConsoleResize tells the guest the size of the terminal, in characters,
	// if its console has a way to.
	ConsoleResize(columns, rows uint16)
}

// MemoryQuery says how to look at memory. The zero value is quick and leaves the
// machine running.
type MemoryQuery struct {
	// Full reads memory for what the book of names does not know.
	Full bool
	// Pause pauses a running machine meanwhile, so that the answer is exact.
	Pause bool
}

// Bounds of a [MemoryMap]. Up to MaxMapPages pages of RAM a cell is a page, above
// it is a large frame, doubled until there are at most MaxMapCells.
const (
	MaxMapPages   = 1 << 20
	MaxMapCells   = 1 << 16
	MaxMapClasses = 16
)
