package serial

import (
	"context"
	"fmt"
	"io"
)

// WriteInput feeds p to the guest. It blocks while the receive FIFO is full,
// until ctx is done or the device is closed, and returns how many bytes went
// in.
func (d *Device) WriteInput(ctx context.Context, p []byte) (int, error) {
	stop := d.wakeOn(ctx)
	defer stop()
	d.mu.Lock()
	defer d.mu.Unlock()
	for n, b := range p {
		if err := d.waitForRoom(ctx); err != nil {
			return n, err
		}
		d.received = append(d.received, received{data: b})
		d.updateLine()
	}
	return len(p), nil
}

// SendBreak sends the guest a break condition, which Linux's console takes for
// the start of a magic SysRq. It blocks like WriteInput.
func (d *Device) SendBreak(ctx context.Context) error {
	stop := d.wakeOn(ctx)
	defer stop()
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.waitForRoom(ctx); err != nil {
		return err
	}
	d.received = append(d.received, received{flags: lsrBreak})
	d.updateLine()
	return nil
}

// wakeOn wakes those who wait for room when ctx is done.
func (d *Device) wakeOn(ctx context.Context) (stop func() bool) {
	return context.AfterFunc(ctx, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.changed.Broadcast()
	})
}

// waitForRoom waits until the FIFO takes a byte from outside. Preconditions:
// d.mu is held.
func (d *Device) waitForRoom(ctx context.Context) error {
	for {
		switch {
		case d.closed:
			return fmt.Errorf("serial input: %w", io.ErrClosedPipe)
		case ctx.Err() != nil:
			return fmt.Errorf("serial input: %w", ctx.Err())
		case !d.paused && d.mcr&mcrLoop == 0 && len(d.received) < d.capacity():
			return nil
		}
		d.changed.Wait()
	}
}

// capacity is how many bytes the receiver holds.
func (d *Device) capacity() int {
	if d.fcr&fcrEnable == 0 {
		return 1
	}
	return fifoSize
}

// trigger is how many bytes raise the receive interrupt.
func (d *Device) trigger() int {
	if d.fcr&fcrEnable == 0 {
		return 1
	}
	return triggerLevels[d.fcr>>fcrTriggerShift]
}

// readData takes the oldest byte out of the receiver. Preconditions: d.mu is
// held.
func (d *Device) readData() uint8 {
	if len(d.received) == 0 {
		return 0
	}
	b := d.received[0].data
	copy(d.received, d.received[1:])
	d.received = d.received[:len(d.received)-1]
	d.updateLine()
	d.changed.Broadcast()
	return b
}

// lineErrors returns the error bits that LSR shows: an overrun, and those of
// the byte that is read next.
func (d *Device) lineErrors() uint8 {
	var v uint8
	if d.overrun {
		v |= lsrOverrun
	}
	if len(d.received) > 0 {
		v |= d.received[0].flags
	}
	return v
}

// readLSR returns the line status and takes the errors back. Preconditions:
// d.mu is held.
func (d *Device) readLSR() uint8 {
	v := d.lineErrors()
	if d.out.ready() {
		v |= lsrTransmitter
	}
	if len(d.received) > 0 {
		v |= lsrDataReady
	}
	if d.fcr&fcrEnable != 0 {
		for _, r := range d.received {
			if r.flags != 0 {
				v |= lsrFIFOError
			}
		}
	}
	if v&lsrErrors != 0 {
		d.overrun = false
		if len(d.received) > 0 {
			d.received[0].flags = 0
		}
		d.updateLine()
	}
	return v
}

// writeData sends a byte, or receives it in loopback mode. Preconditions: d.mu
// is held.
func (d *Device) writeData(b uint8) {
	if d.mcr&mcrLoop != 0 {
		if len(d.received) < d.capacity() {
			d.received = append(d.received, received{data: b})
		} else {
			d.overrun = true
		}
		d.transmitReady = true
		d.updateLine()
		return
	}
	d.transmitReady = d.out.send(b)
	d.updateLine()
}

// transmitterReady is called when the transmit buffer was full and has room
// again.
func (d *Device) transmitterReady() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.transmitReady = true
	d.updateLine()
}
