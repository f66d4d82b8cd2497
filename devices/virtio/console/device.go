package console

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio"
)

// Queues of port 0 (virtio 1.2 5.3.2).
const (
	receiveQueue = iota
	transmitQueue
	numQueues

	queueSize = 64
)

// Feature bits (virtio 1.2 5.3.3).
const (
	featureSize      uint64 = 1 << 0
	featureEmergency uint64 = 1 << 2
)

// Layout of struct virtio_console_config (virtio 1.2 5.3.4).
const (
	configCols      = 0
	configRows      = 2
	configEmergency = 8
	configSize      = 12
)

// Sizes of the buffers in bytes. The output buffer holds the largest chain
// that the device takes and then some; the input buffer what is pasted at once.
const (
	outputSize = 128 << 10
	inputSize  = 16 << 10
)

// Config is what the device is made from.
type Config struct {
	// Output gets what the guest sends. It may block.
	Output io.Writer
	// Cols and Rows are the size of the terminal, 0 when it is not known.
	Cols, Rows uint16
}

// Device is a virtio console. It implements [virtio.Device].
type Device struct {
	output io.Writer
	wake   int           // eventfd: the worker has input or room for output
	done   chan struct{} // closed when the output goroutine has ended
	run    *run          // while started; lifecycle calls only

	mu            sync.Mutex
	changed       *sync.Cond // on every change below
	in, out       ring
	writing       bool // the output goroutine is in Write
	closed        bool
	cols, rows    uint16
	configChanged func() // while started
}

// New makes a device and starts its output goroutine.
func New(config Config) (*Device, error) {
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("virtio console: eventfd: %w", err)
	}
	d := &Device{
		output: config.Output,
		wake:   wake,
		done:   make(chan struct{}),
		in:     newRing(inputSize),
		out:    newRing(outputSize),
		cols:   config.Cols,
		rows:   config.Rows,
	}
	d.changed = sync.NewCond(&d.mu)
	go d.write()
	return d, nil
}

// Close writes what the guest has sent, ends the output goroutine and makes
// WriteInput fail. The device must be stopped.
func (d *Device) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	d.changed.Broadcast()
	d.mu.Unlock()
	<-d.done
	return unix.Close(d.wake)
}

// ID implements [virtio.Device].
func (d *Device) ID() virtio.ID { return virtio.IDConsole }

// Features implements [virtio.Device].
func (d *Device) Features() uint64 { return featureSize | featureEmergency }

// QueueSizes implements [virtio.Device].
func (d *Device) QueueSizes() []uint16 { return []uint16{queueSize, queueSize} }

// ReadConfig implements [virtio.Device].
func (d *Device) ReadConfig(offset uint64, data []byte) {
	var config [configSize]byte
	d.mu.Lock()
	binary.LittleEndian.PutUint16(config[configCols:], d.cols)
	binary.LittleEndian.PutUint16(config[configRows:], d.rows)
	d.mu.Unlock()
	clear(data)
	if offset < configSize {
		copy(data, config[offset:])
	}
}

// WriteConfig implements [virtio.Device]: a byte written to emerg_wr is
// output, as far as there is room, even before the device is started.
func (d *Device) WriteConfig(offset uint64, data []byte) {
	if offset > configEmergency || offset+uint64(len(data)) <= configEmergency {
		return
	}
	at := configEmergency - offset
	d.mu.Lock()
	defer d.mu.Unlock()
	d.out.put(data[at : at+1])
	d.changed.Broadcast()
}

// Resize tells the guest the size of the terminal.
func (d *Device) Resize(cols, rows uint16) {
	d.mu.Lock()
	tell := d.configChanged
	if cols == d.cols && rows == d.rows {
		tell = nil
	}
	d.cols, d.rows = cols, rows
	d.mu.Unlock()
	if tell != nil {
		tell()
	}
}

// Start implements [virtio.Device].
func (d *Device) Start(a virtio.Activation) error {
	r, err := newRun(a, d)
	if err != nil {
		return err
	}
	d.run = r
	if a.Has(featureSize) {
		d.mu.Lock()
		d.configChanged = a.ConfigChanged
		d.mu.Unlock()
	}
	return nil
}

// Stop implements [virtio.Device].
func (d *Device) Stop() {
	d.mu.Lock()
	d.configChanged = nil
	d.mu.Unlock()
	d.run.worker.Stop()
	d.run = nil
}

// Pause implements [virtio.Device].
func (d *Device) Pause() { d.run.worker.Pause() }

// Resume implements [virtio.Device].
func (d *Device) Resume() { d.run.worker.Resume() }

// ErrClosed is returned by writes after [Device.Close].
var ErrClosed = errors.New("console is closed")
