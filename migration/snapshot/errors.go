package snapshot

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// What callers decide by. Every error says besides what is wrong with which
// file.
var (
	// ErrFormat: the bytes are not a snapshot, truncated or altered.
	ErrFormat = errors.New("not an intact snapshot")
	// ErrVersion: the snapshot is of a newer version of the format.
	ErrVersion = errors.New("the snapshot is of a newer version")
	// ErrLayer: a disk layer that pages are named by is missing, or is not what
	// it was.
	ErrLayer = errors.New("layer missing or changed")
	// ErrParent: a parent snapshot is missing, or is not what it was.
	ErrParent = errors.New("parent snapshot missing or changed")
	// ErrLayerWritten: pages are to be named by a layer that is still written.
	// The cure is to freeze it under an overlay first.
	ErrLayerWritten = errors.New("the layer is still being written")
	// ErrExists: there is something of that name already.
	ErrExists = errors.New("it exists already")
	// ErrBusy: another save into that name is under way.
	ErrBusy = errors.New("another save into it is under way")
	// ErrNoSpace: the disk is full.
	ErrNoSpace = errors.New("no space left for the snapshot")
	// ErrDependents: other snapshots have it as their parent.
	ErrDependents = errors.New("other snapshots depend on it")
)

// formatError says what is wrong with the bytes of a snapshot.
func formatError(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrFormat, fmt.Sprintf(format, args...))
}

// writeError adds to an error of writing that the disk is full, if it is.
func writeError(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}
