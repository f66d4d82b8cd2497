package memory_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"ditto.vm/memory"
)

// pinnedReader reads files into one buffer that stays pinned, as a device does
// whose request was submitted before its pages were armed: io_uring with a
// registered buffer (io_uring_register(2), IORING_REGISTER_BUFFERS).
type pinnedReader struct {
	fd         int
	ring, sqes []byte
	tail       uint32 // offset of the submission queue's tail in ring
	array      uint32
	cqHead     uint32
	buf        []byte
}

// newPinnedReader pins buf.
func newPinnedReader(t *testing.T, buf []byte) *pinnedReader {
	t.Helper()
	var params [120]byte
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params[0])), 0)
	if errno != 0 {
		t.Skipf("io_uring_setup: %v; try: sysctl kernel.io_uring_disabled=0", errno)
	}
	word := func(off int) uint32 { return binary.LittleEndian.Uint32(params[off:]) }
	r := &pinnedReader{fd: int(fd), tail: word(40 + 4), array: word(40 + 24), cqHead: word(80), buf: buf}
	t.Cleanup(func() { _ = unix.Close(r.fd) })
	var err error
	// IORING_FEAT_SINGLE_MMAP: both rings are in one mapping, the larger one.
	size := max(int(r.array)+4*int(word(0)), int(word(80+20))+16*int(word(4)))
	if r.ring, err = unix.Mmap(r.fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		t.Fatal(err)
	}
	if r.sqes, err = unix.Mmap(r.fd, 0x10000000, 64, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = unix.Munmap(r.ring), unix.Munmap(r.sqes) })
	vec := unix.Iovec{Base: &buf[0]}
	vec.SetLen(len(buf))
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, fd, 0, uintptr(unsafe.Pointer(&vec)), 1, 0, 0); errno != 0 {
		t.Skipf("pin %d bytes: %v; try: ulimit -l unlimited", len(buf), errno)
	}
	return r
}

// read fills the buffer from the start of a file.
func (r *pinnedReader) read(t *testing.T, file int) {
	t.Helper()
	const opReadFixed = 4
	le := binary.LittleEndian
	clear(r.sqes)
	r.sqes[0] = opReadFixed
	le.PutUint32(r.sqes[4:], uint32(file))
	// SAFETY: buf is mapped memory outside the Go heap, which does not move.
	le.PutUint64(r.sqes[16:], uint64(uintptr(unsafe.Pointer(&r.buf[0]))))
	le.PutUint32(r.sqes[24:], uint32(len(r.buf)))
	le.PutUint32(r.ring[r.array:], 0)
	// One thread submits and waits: the system call orders these stores.
	le.PutUint32(r.ring[r.tail:], le.Uint32(r.ring[r.tail:])+1)
	n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), 1, 1, 1, 0, 0)
	runtime.KeepAlive(r)
	if errno != 0 || n != 1 {
		t.Fatalf("io_uring_enter: %d, %v", n, errno)
	}
	le.PutUint32(r.ring[r.cqHead:], le.Uint32(r.ring[r.cqHead:])+1)
}

// TestPinnedIO: I/O into pages that were pinned before they were armed is not
// seen by wp-async, which is why a device reports it when it completes.
func TestPinnedIO(t *testing.T) {
	s := newSpace(t, memory.Config{Size: frame})
	tr := open(t, s, memory.TrackerWPAsync)
	fill(t, s)
	content := bytes.Repeat([]byte("ditto"), page)[:page]
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	const at = 7 * page
	buf, err := s.Writable(at, page)
	if err != nil {
		t.Fatal(err)
	}
	r := newPinnedReader(t, buf)
	all := memory.Range{Size: frame}
	if err := tr.Arm(all); err != nil {
		t.Fatal(err)
	}
	r.read(t, int(file.Fd()))
	if !bytes.Equal(buf, content) {
		t.Fatal("the read did not arrive")
	}
	set := s.NewPageSet()
	if err := tr.Collect(all, set, memory.Rearm); err != nil {
		t.Fatal(err)
	}
	if set.Has(at) {
		t.Error("wp-async saw a write to a pinned page: reporting completed I/O is no longer needed")
	}
	s.Wrote(at, page)
	if err := tr.Collect(all, set, memory.Rearm); err != nil {
		t.Fatal(err)
	}
	if !set.Has(at) || set.Count() != 1 {
		t.Errorf("%d pages after the report, want the one that was read into", set.Count())
	}
}
