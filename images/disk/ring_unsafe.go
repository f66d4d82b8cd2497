package disk

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ringSetup is io_uring_setup(2).
func ringSetup(entries uint32, params *[ringParamsSize]byte) (fd int, errno unix.Errno) {
	// SAFETY: params has the size of struct io_uring_params and lives
	// through the call.
	n, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(entries), uintptr(unsafe.Pointer(params)), 0)
	return int(n), errno
}

// ringEnter is io_uring_enter(2), which submits n entries and does not wait.
func ringEnter(fd int, n uint32) (submitted int, errno unix.Errno) {
	k, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(fd), uintptr(n), 0, 0, 0, 0)
	return int(k), errno
}

// ringRegister is io_uring_register(2) with a table of n elements.
func ringRegister(fd int, opcode uintptr, table []byte, n int) error {
	// SAFETY: table is read during the call only; nil for no table.
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(fd), opcode, uintptr(unsafe.Pointer(unsafe.SliceData(table))), uintptr(n), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// load reads a shared field with acquire order.
func (r *ring) load(offset uint32) uint32 {
	// SAFETY: the kernel's offsets lie inside the mapping (checked by the
	// slice) and are 4-aligned.
	return atomic.LoadUint32((*uint32)(unsafe.Pointer(&r.rings[offset : offset+4][0])))
}

// store writes a shared field with release order.
func (r *ring) store(offset, value uint32) {
	// SAFETY: as in load.
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&r.rings[offset : offset+4][0])), value)
}

// readv prepares a read into iov, which stays as it is until the request
// completes; it is reachable from the queue's op for as long.
func (r *ring) readv(file int, token uint64, iov []unix.Iovec, offset int64) {
	op, addr, n := vector(iov, ringOpRead, ringOpReadv)
	r.entry(op, file, token, offset, addr, n, 0)
}

// writev prepares a write of iov, on the same terms.
func (r *ring) writev(file int, token uint64, iov []unix.Iovec, offset int64, flags uint32) {
	op, addr, n := vector(iov, ringOpWrite, ringOpWritev)
	r.entry(op, file, token, offset, addr, n, flags)
}

// vector chooses the plain operation for a single buffer, which spares the
// kernel from fetching the vector.
func vector(iov []unix.Iovec, one, many byte) (op byte, addr uint64, n uint32) {
	if len(iov) == 1 {
		// SAFETY: the address goes to the kernel. It is guest memory, or a
		// Go buffer that the op's bufs keep alive; the heap does not move.
		return one, uint64(uintptr(unsafe.Pointer(iov[0].Base))), uint32(iov[0].Len)
	}
	// SAFETY: iov's backing array is on the heap, owned by the op.
	return many, uint64(uintptr(unsafe.Pointer(unsafe.SliceData(iov)))), uint32(len(iov))
}

// pwritev is pwritev(2) without the copies of x/sys.
func pwritev(fd int, iov []unix.Iovec, offset int64) (int, unix.Errno) {
	for {
		// SAFETY: iov and what it points to are used during the call only.
		n, _, errno := unix.Syscall6(unix.SYS_PWRITEV, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)), uintptr(offset), 0, 0)
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}
