package lend

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// network is SOCK_SEQPACKET: it keeps messages apart, and descriptors with
// theirs.
const network = "unixpacket"

// Listen makes the socket at path, which only its user may connect to. Who
// takes the machine down removes it.
func Listen(path string) (*net.UnixListener, error) {
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: path, Net: network})
	if err != nil {
		return nil, fmt.Errorf("socket for operations: %w", err)
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("socket for operations: %w", err), l.Close())
	}
	return l, nil
}

// conn is a connection of messages. It may be written from any goroutine, and is
// read by one.
type conn struct {
	*net.UnixConn
	in, rights []byte // what read fills
}

func newConn(c *net.UnixConn) *conn {
	// A byte more than is allowed shows that there is too much.
	return &conn{c, make([]byte, MaxMessage+1), make([]byte, unix.CmsgSpace(4*MaxFiles))}
}

// write sends a message with files, which stay the caller's.
func (c *conn) write(m message, files ...*os.File) error {
	m.Files = len(files)
	b, err := m.encode()
	if err != nil {
		return err
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	_, _, err = c.WriteMsgUnix(b, rights, nil)
	return err
}

// offer sends a message unless that would have to wait. Nobody hears of one
// that is lost.
func (c *conn) offer(m message) {
	b, err := m.encode()
	if err != nil {
		return
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	// Control, unlike Write, does not wait for a write that waits.
	_ = raw.Control(func(fd uintptr) {
		_, _ = unix.SendmsgN(int(fd), b, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	})
}

// read returns the next message, with its files, which are the caller's. It
// fails with io.EOF when the other end is gone.
func (c *conn) read() (message, []*os.File, error) {
	n, rightsLen, flags, _, err := c.ReadMsgUnix(c.in, c.rights)
	if err != nil {
		return message{}, nil, err
	}
	files, err := takeFiles(c.rights[:rightsLen])
	if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = fmt.Errorf("%w: a message of more than %d bytes or %d descriptors", ErrProtocol, MaxMessage, MaxFiles)
	}
	if err == nil && n == 0 {
		err = io.EOF
	}
	var m message
	if err == nil {
		m, err = decode(c.in[:n], len(files))
	}
	if err != nil {
		closeAll(files)
		return message{}, nil, err
	}
	return m, files, nil
}

// takeFiles makes files of the descriptors that came with a message.
func takeFiles(rights []byte) ([]*os.File, error) {
	if len(rights) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	var files []*os.File
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			closeAll(files)
			return nil, fmt.Errorf("%w: %w", ErrProtocol, err)
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "lent"))
		}
	}
	return files, nil
}

// closeAll closes files that were lent to nobody's use.
func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// CheckRegular checks that a file that was lent is a regular file and was opened
// with these flags: of the access mode (O_RDONLY, O_RDWR), O_DIRECT and
// O_APPEND, exactly those.
func CheckRegular(f *os.File, flags int) error {
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("what was lent: %w", err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%w: what was lent is not a regular file", ErrProtocol)
	}
	const compared = unix.O_ACCMODE | unix.O_DIRECT | unix.O_APPEND
	has, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return fmt.Errorf("what was lent: %w", err)
	}
	if has&compared != flags&compared {
		return fmt.Errorf("%w: the file that was lent is open with the flags %#x instead of %#x", ErrProtocol, has&compared, flags&compared)
	}
	return nil
}

// CheckStream checks that what was lent is a stream socket that is connected.
func CheckStream(f *os.File) error {
	fd := int(f.Fd())
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if errors.Is(err, unix.ENOTSOCK) || err == nil && kind != unix.SOCK_STREAM {
		return fmt.Errorf("%w: what was lent is not a stream socket", ErrProtocol)
	}
	if err == nil {
		_, err = unix.Getpeername(fd)
	}
	if err != nil {
		return fmt.Errorf("the socket that was lent: %w", err)
	}
	return nil
}
