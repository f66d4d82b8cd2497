package storage

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// recordFile holds the records on a disk with a file system.
const recordFile = "records"

// recordsEnd is where a writer stops, in bytes.
const recordsEnd = 32 << 20

// maxBatch is how many records are flushed at once.
const maxBatch = 8

// ackFormat is an acknowledgement: disk, last sequence number flushed, and the
// checksum of that record.
const ackFormat = "ACK %d %d %08x\n"

// writeRecords writes to every disk at once, and acknowledges what it has
// flushed, until the power is cut. Job words: disks, a letter for each, r for
// raw and f for a file on ext4; seed; nap, how many milliseconds to rest after
// each batch, if any.
func writeRecords(args guestArgs) error {
	seed, nap := args.number("seed"), time.Duration(0)
	if args["nap"] != "" {
		nap = time.Duration(args.number("nap")) * time.Millisecond
	}
	var mu sync.Mutex // of the console
	var wg sync.WaitGroup
	errs := make([]error, len(args["disks"]))
	for i, kind := range args["disks"] {
		f, err := openRecords(fmt.Sprintf("/dev/vd%c", 'a'+i), kind)
		if err != nil {
			return err
		}
		wg.Go(func() {
			errs[i] = writeDisk(f, seed, i, func(seq uint64, sum uint32) {
				defer time.Sleep(nap)
				mu.Lock()
				defer mu.Unlock()
				fmt.Printf(ackFormat, i, seq, sum)
			})
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// openRecords opens the disk, or a new file on it whose name is stable.
func openRecords(dev string, kind rune) (*os.File, error) {
	if kind == 'r' {
		return os.OpenFile(dev, os.O_RDWR, 0)
	}
	dir, err := mountExt4(dev, "")
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, recordFile), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	return f, errors.Join(f.Sync(), d.Sync(), d.Close())
}

// writeDisk writes batches of records and flushes each.
func writeDisk(f *os.File, seed uint64, disk int, ack func(seq uint64, sum uint32)) error {
	rng := rand.New(rand.NewPCG(seed, uint64(disk)))
	seq := uint64(0)
	for offset(seq+maxBatch+1) < recordsEnd {
		var last []byte
		for range 1 + rng.IntN(maxBatch) {
			seq++
			last = record(seed, disk, seq)
			if _, err := f.WriteAt(last, offset(seq)); err != nil {
				return err
			}
		}
		if err := f.Sync(); err != nil {
			return err
		}
		ack(seq, checksum(last))
	}
	return nil
}

// acks reads acknowledgements off a console.
type acks struct {
	seed uint64

	mu    sync.Mutex
	text  strings.Builder
	line  []byte
	last  []uint64 // by disk
	count int
	err   error
	more  chan struct{} // signalled at every acknowledgement and at the end
}

func newAcks(seed uint64, disks int) *acks {
	return &acks{seed: seed, last: make([]uint64, disks), more: make(chan struct{}, 1)}
}

// Write implements io.Writer.
func (a *acks) Write(b []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.text.Write(b)
	for _, c := range b {
		if c != '\n' {
			a.line = append(a.line, c)
			continue
		}
		a.read(strings.TrimRight(string(a.line), "\r") + "\n")
		a.line = a.line[:0]
	}
	return len(b), nil
}

// read takes one line. Preconditions: mu is held.
func (a *acks) read(line string) {
	var disk int
	var seq uint64
	var sum uint32
	if n, err := fmt.Sscanf(line, ackFormat, &disk, &seq, &sum); err != nil || n != 3 {
		return
	}
	switch {
	case disk < 0 || disk >= len(a.last) || seq <= a.last[disk]:
		a.err = errors.Join(a.err, fmt.Errorf("%q is out of order", line))
	case sum != checksum(record(a.seed, disk, seq)):
		a.err = errors.Join(a.err, fmt.Errorf("%q: another record was meant", line))
	default:
		a.last[disk] = seq
		a.count++
	}
	select {
	case a.more <- struct{}{}:
	default:
	}
}

// state returns how many acknowledgements came, and whether from every disk.
func (a *acks) state() (count int, all bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	all = true
	for _, seq := range a.last {
		all = all && seq > 0
	}
	return a.count, all, a.err
}

// seen returns the last sequence number acknowledged, by disk.
func (a *acks) seen() []uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]uint64(nil), a.last...)
}

// String returns the console's text.
func (a *acks) String() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.text.String()
}
