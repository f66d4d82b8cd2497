package console

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"
)

// WriteInput feeds p to the guest. It blocks while the input buffer is full,
// until ctx is done or the device is closed, and returns how many bytes went
// in.
func (d *Device) WriteInput(ctx context.Context, p []byte) (int, error) {
	defer context.AfterFunc(ctx, d.broadcast)()
	d.mu.Lock()
	defer d.mu.Unlock()
	total := 0
	for {
		switch {
		case d.closed:
			return total, ErrClosed
		case ctx.Err() != nil:
			return total, ctx.Err()
		}
		if n := d.in.put(p[total:]); n > 0 {
			total += n
			signal(d.wake)
		}
		if total == len(p) {
			return total, nil
		}
		d.changed.Wait()
	}
}

// Flush waits until everything that the guest has sent was written to Output.
func (d *Device) Flush(ctx context.Context) error {
	defer context.AfterFunc(ctx, d.broadcast)()
	d.mu.Lock()
	defer d.mu.Unlock()
	for d.out.used > 0 || d.writing {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		d.changed.Wait()
	}
	return nil
}

func (d *Device) broadcast() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.changed.Broadcast()
}

// write is the output goroutine. Errors of Output lose its bytes and nothing
// more: a log file on a full disk does not stop the guest.
func (d *Device) write() {
	defer close(d.done)
	var p [4096]byte
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		n := d.out.take(p[:])
		if n == 0 {
			if d.closed {
				return
			}
			d.changed.Wait()
			continue
		}
		d.writing = true
		d.mu.Unlock()
		_, _ = d.output.Write(p[:n])
		d.mu.Lock()
		d.writing = false
		d.changed.Broadcast()
		signal(d.wake)
	}
}

// signal adds one to an eventfd. A full counter is as good as a signal.
func signal(fd int) {
	one := [8]byte{1}
	for {
		if _, err := unix.Write(fd, one[:]); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}
