package terminal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// CopyInput hands what can be read from f to handle until the input or ctx
// ends. It leaves nothing reading f behind.
func CopyInput(ctx context.Context, f *os.File, handle func([]byte)) error {
	wakeRead, wakeWrite, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("terminal: %w", err)
	}
	defer wakeRead.Close()
	stop := context.AfterFunc(ctx, func() { _ = wakeWrite.Close() })
	defer func() {
		if stop() {
			_ = wakeWrite.Close()
		}
	}()
	return readInput(f, wakeRead, func(p []byte) error {
		handle(p)
		return nil
	})
}

// readInput reads f until its end, until wake is closed, or until handle
// returns an error; io.EOF then ends without one.
func readInput(f, wake *os.File, handle func([]byte) error) error {
	buf := make([]byte, 1024)
	for {
		ready, err := waitReadable(f, wake)
		if err != nil || !ready {
			return err
		}
		n, err := unix.Read(int(f.Fd()), buf)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case errors.Is(err, unix.EIO) || n == 0 && err == nil:
			return nil // the terminal is gone, or the end of a file
		case err != nil:
			return fmt.Errorf("terminal: %w", err)
		}
		if err := handle(buf[:n]); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

// waitReadable waits until in has input. It returns false when wake was closed.
func waitReadable(in, wake *os.File) (bool, error) {
	for {
		fds := []unix.PollFd{{Fd: int32(in.Fd()), Events: unix.POLLIN}, {Fd: int32(wake.Fd()), Events: unix.POLLIN}}
		_, err := unix.Poll(fds, -1)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return false, fmt.Errorf("terminal: %w", err)
		case fds[1].Revents != 0:
			return false, nil
		case fds[0].Revents != 0:
			return true, nil
		}
	}
}
