package registry

import (
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// DefaultLogCap is how large a console log grows before it is turned over;
// with its predecessor, a machine keeps twice as much.
const DefaultLogCap = 8 << 20

// LogFile is a console log on disk, capped. Both of its files are opened at the
// start and it never opens another: the sandbox forbids it. Turning over copies
// the log to its predecessor and truncates it.
type LogFile struct {
	mu   sync.Mutex // guards what follows
	now  *os.File
	old  *os.File
	size int64
	cap  int64
}

// OpenLog opens the console log of the lease with the given cap in bytes. What
// an earlier run logged becomes the predecessor.
func (l *Lease) OpenLog(capBytes int64) (*LogFile, error) {
	f, err := l.ContinueLog(capBytes)
	if err != nil {
		return nil, err
	}
	if err = f.measure(); err == nil && f.size > 0 {
		err = f.turnOver()
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("console log: %w", err)
	}
	return f, nil
}

// measure learns how long the log is.
func (f *LogFile) measure() error {
	st, err := f.now.Stat()
	if err == nil {
		f.size = st.Size()
	}
	return err
}

// ContinueLog is OpenLog for a name that was adopted: what is written first goes
// behind what the other process has written by then.
func (l *Lease) ContinueLog(capBytes int64) (*LogFile, error) {
	open := func(path string) (*os.File, error) {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, fmt.Errorf("console log: %w", err)
		}
		return f, nil
	}
	now, err := open(l.LogPath())
	if err != nil {
		return nil, err
	}
	old, err := open(l.LogPath() + ".1")
	if err != nil {
		_ = now.Close()
		return nil, err
	}
	return &LogFile{now: now, old: old, cap: capBytes, size: unmeasured}, nil
}

// unmeasured is the size of a log that somebody else writes still.
const unmeasured = -1

// Write appends p. It never writes part of p without an error.
func (f *LogFile) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.size == unmeasured {
		if err := f.measure(); err != nil {
			return 0, fmt.Errorf("console log: %w", err)
		}
	}
	if f.size > 0 && f.size+int64(len(p)) > f.cap {
		if err := f.turnOver(); err != nil {
			return 0, fmt.Errorf("console log: %w", err)
		}
	}
	n, err := f.now.WriteAt(p, f.size)
	f.size += int64(n)
	if err != nil {
		return n, fmt.Errorf("console log: %w", err)
	}
	return n, nil
}

// turnOver makes the log its own predecessor and starts again. Preconditions:
// mu is held, or f is not shared yet.
func (f *LogFile) turnOver() error {
	if err := f.old.Truncate(0); err != nil {
		return err
	}
	if _, err := f.old.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if _, err := io.Copy(f.old, io.NewSectionReader(f.now, 0, f.size)); err != nil {
		return err
	}
	f.size = 0
	return f.now.Truncate(0)
}

// Close closes both files.
func (f *LogFile) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.now.Close()
	if e := f.old.Close(); err == nil {
		err = e
	}
	return err
}
