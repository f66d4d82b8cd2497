package disk

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// The part of the io_uring ABI that is used (linux/io_uring.h). x/sys has the
// system call numbers only.
const (
	ringParamsSize = 120
	sqeSize        = 64
	cqeSize        = 16

	ringOffSQ   = 0
	ringOffSQEs = 0x10000000

	setupClamp         = 1 << 4
	setupRingsDisabled = 1 << 6
	setupCoopTaskrun   = 1 << 8

	featSingleMmap = 1 << 0

	registerRestrictions = 11
	registerEnable       = 12

	restrictionSQEOp = 1

	ringOpReadv  = 1
	ringOpWritev = 2
	ringOpFsync  = 3
	ringOpRead   = 22
	ringOpWrite  = 23

	fsyncDatasync = 1
)

// ring is an io_uring that can do nothing but read, write and flush: the
// kernel holds it to that (IORING_REGISTER_RESTRICTIONS), so what takes over
// the process later gains no system call by it.
//
// The file is not registered with the ring. The kernel takes rings down some
// time after a process has died, and until then a registered file would keep
// its lock.
type ring struct {
	fd      int
	rings   []byte // submission and completion ring
	sqes    []byte
	sq, cq  ringOffsets
	sqMask  uint32
	cqMask  uint32
	entries uint32
	tail    uint32 // of the submission ring, not all of it published
	queued  uint32 // not submitted yet
}

// ringOffsets say where the fields of one ring are in the mapping.
type ringOffsets struct {
	head, tail, mask, entries uint32
	array                     uint32 // of indexes (submission), of cqes (completion)
}

// newRing makes a ring for depth requests on file. It fails where io_uring is
// not allowed or too old.
func newRing(depth int) (*ring, error) {
	r, err := setupRing(uint32(depth), setupClamp|setupRingsDisabled|setupCoopTaskrun)
	if errors.Is(err, unix.EINVAL) { // before Linux 5.19
		r, err = setupRing(uint32(depth), setupClamp|setupRingsDisabled)
	}
	if err != nil {
		return nil, err
	}
	if int(r.entries) < depth {
		return nil, errors.Join(fmt.Errorf("io_uring of %d entries, want %d", r.entries, depth), r.close())
	}
	if err := r.restrict(); err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

// setupRing makes and maps a ring.
func setupRing(depth, flags uint32) (*ring, error) {
	var params [ringParamsSize]byte
	le := binary.LittleEndian
	le.PutUint32(params[8:], flags)
	fd, errno := ringSetup(depth, &params)
	if errno != 0 {
		return nil, fmt.Errorf("io_uring_setup: %w", errno)
	}
	r := &ring{fd: fd, entries: le.Uint32(params[0:])}
	cqEntries := le.Uint32(params[4:])
	if le.Uint32(params[20:])&featSingleMmap == 0 {
		return nil, errors.Join(errors.New("io_uring is too old"), r.close())
	}
	// struct io_sqring_offsets at 40, struct io_cqring_offsets at 80.
	r.sq = ringOffsets{le.Uint32(params[40:]), le.Uint32(params[44:]), le.Uint32(params[48:]), le.Uint32(params[52:]), le.Uint32(params[64:])}
	r.cq = ringOffsets{le.Uint32(params[80:]), le.Uint32(params[84:]), le.Uint32(params[88:]), le.Uint32(params[92:]), le.Uint32(params[100:])}
	size := max(r.sq.array+4*r.entries, r.cq.array+cqeSize*cqEntries)
	var err error
	if r.rings, err = unix.Mmap(fd, ringOffSQ, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return nil, errors.Join(fmt.Errorf("map io_uring: %w", err), r.close())
	}
	if r.sqes, err = unix.Mmap(fd, ringOffSQEs, int(r.entries)*sqeSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return nil, errors.Join(fmt.Errorf("map io_uring entries: %w", err), r.close())
	}
	r.sqMask, r.cqMask = r.load(r.sq.mask), r.load(r.cq.mask)
	// Entry i of the index array names sqe i for good.
	for i := range r.entries {
		le.PutUint32(r.rings[r.sq.array+4*i:], i)
	}
	return r, nil
}

// restrict leaves the ring with five operations.
func (r *ring) restrict() error {
	// struct io_uring_restriction: le16 opcode, u8 value, 13 reserved.
	ops := [...]byte{ringOpRead, ringOpWrite, ringOpReadv, ringOpWritev, ringOpFsync}
	var table [16 * len(ops)]byte
	for i, op := range ops {
		binary.LittleEndian.PutUint16(table[16*i:], restrictionSQEOp)
		table[16*i+2] = op
	}
	if err := ringRegister(r.fd, registerRestrictions, table[:], len(ops)); err != nil {
		return fmt.Errorf("restrict io_uring: %w", err)
	}
	if err := ringRegister(r.fd, registerEnable, nil, 0); err != nil {
		return fmt.Errorf("enable io_uring: %w", err)
	}
	return nil
}

func (r *ring) close() error {
	var errs []error
	for _, m := range [][]byte{r.sqes, r.rings} {
		if m != nil {
			errs = append(errs, unix.Munmap(m))
		}
	}
	return errors.Join(append(errs, unix.Close(r.fd))...)
}

// entry prepares the next submission. There is always room: a ring has an
// entry for every token.
func (r *ring) entry(op byte, file int, token uint64, offset int64, addr uint64, n, flags uint32) {
	e := r.sqes[(r.tail&r.sqMask)*sqeSize:][:sqeSize]
	clear(e)
	e[0] = op
	le := binary.LittleEndian
	le.PutUint32(e[4:], uint32(file))
	le.PutUint64(e[8:], uint64(offset))
	le.PutUint64(e[16:], addr)
	le.PutUint32(e[24:], n)
	le.PutUint32(e[28:], flags)
	le.PutUint64(e[32:], token)
	r.tail++
	r.queued++
}

func (r *ring) fdatasync(file int, token uint64) {
	r.entry(ringOpFsync, file, token, 0, 0, 0, fsyncDatasync)
}

// submit gives the kernel what was prepared. A ring that is out of resources
// for a moment is asked again, which also makes room by completing requests.
// What the kernel refuses otherwise is taken back: refused gets its tokens.
func (r *ring) submit(refused func(token uint64, errno unix.Errno)) {
	if r.queued == 0 {
		return
	}
	r.store(r.sq.tail, r.tail)
	for r.queued > 0 {
		n, errno := ringEnter(r.fd, r.queued)
		switch errno {
		case 0:
			r.queued -= uint32(n)
		case unix.EINTR, unix.EAGAIN, unix.EBUSY:
		default:
			n := r.queued
			r.tail, r.queued = r.tail-n, 0
			r.store(r.sq.tail, r.tail)
			for i := range n {
				e := r.sqes[((r.tail+i)&r.sqMask)*sqeSize:][:sqeSize]
				refused(binary.LittleEndian.Uint64(e[32:]), errno)
			}
		}
	}
}

// completed takes one result off the completion ring.
func (r *ring) completed() (token uint64, res int32, ok bool) {
	head := r.load(r.cq.head)
	if head == r.load(r.cq.tail) {
		return 0, 0, false
	}
	e := r.rings[r.cq.array+(head&r.cqMask)*cqeSize:][:cqeSize]
	token = binary.LittleEndian.Uint64(e)
	res = int32(binary.LittleEndian.Uint32(e[8:]))
	r.store(r.cq.head, head+1)
	return token, res, true
}
