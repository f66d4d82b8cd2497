package kvm

import (
	"bytes"
	"encoding/binary"
	"fmt"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// Stats is an open statistics descriptor of a VM (KVM API 4.133): a header, the
// descriptors of every counter, and the counters.
type Stats struct {
	fd         int
	dataOffset int64
	counters   []counter
	dataSize   int
}

// counter says where the first value of a statistic lies in the data block.
type counter struct {
	name   string
	offset int
}

// Bounds of what the kernel may report; real kernels have about 60 counters
// with names of 48 bytes.
const (
	maxStatsName     = 256
	maxStatsCounters = 4096
)

func openStats(fd int) (*Stats, error) {
	statsFD, err := ioctl("KVM_GET_STATS_FD", fd, gokvm.IIO(nrGetStatsFD), 0)
	if err != nil {
		return nil, err
	}
	s := &Stats{fd: statsFD}
	if err := s.readDescriptors(); err != nil {
		_ = s.Close()
		return nil, fmt.Errorf("KVM statistics: %w", err)
	}
	return s, nil
}

// Close closes the descriptor.
func (s *Stats) Close() error { return unix.Close(s.fd) }

// readDescriptors parses struct kvm_stats_header and the kvm_stats_desc array.
func (s *Stats) readDescriptors() error {
	header := make([]byte, 24)
	if err := preadFull(s.fd, header, 0); err != nil {
		return err
	}
	word := func(i int) uint32 { return binary.LittleEndian.Uint32(header[4*i:]) }
	nameSize, count := word(1), word(2)
	descOffset, dataOffset := word(4), word(5)
	if nameSize > maxStatsName || count > maxStatsCounters {
		return fmt.Errorf("%d counters with names of %d bytes: %w", count, nameSize, unix.EPROTO)
	}
	s.dataOffset = int64(dataOffset)

	size := int(16 + nameSize)
	descs := make([]byte, size*int(count))
	if err := preadFull(s.fd, descs, int64(descOffset)); err != nil {
		return err
	}
	for i := range int(count) {
		// u32 flags; s16 exponent; u16 size; u32 offset; u32 bucket_size; char name[]
		d := descs[i*size : (i+1)*size]
		values := int(binary.LittleEndian.Uint16(d[6:]))
		offset := int(binary.LittleEndian.Uint32(d[8:]))
		name, _, _ := bytes.Cut(d[16:], []byte{0})
		s.counters = append(s.counters, counter{name: string(name), offset: offset})
		s.dataSize = max(s.dataSize, offset+8*values)
	}
	if s.dataSize > 8*maxStatsCounters*64 {
		return fmt.Errorf("data block of %d bytes: %w", s.dataSize, unix.EPROTO)
	}
	return nil
}

// Read returns every counter's first value by name, such as pages_2m.
func (s *Stats) Read() (map[string]uint64, error) {
	data := make([]byte, s.dataSize)
	if err := preadFull(s.fd, data, s.dataOffset); err != nil {
		return nil, fmt.Errorf("KVM statistics: %w", err)
	}
	values := make(map[string]uint64, len(s.counters))
	for _, c := range s.counters {
		if c.offset+8 <= len(data) {
			values[c.name] = binary.LittleEndian.Uint64(data[c.offset:])
		}
	}
	return values, nil
}

func preadFull(fd int, p []byte, offset int64) error {
	for len(p) > 0 {
		n, err := unix.Pread(fd, p, offset)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return unix.ENODATA
		}
		p, offset = p[n:], offset+int64(n)
	}
	return nil
}
