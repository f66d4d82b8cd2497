package cli

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// errOtherUser refuses a machine of another user of this host: whoever sends one
// decides which files are its disks.
var errOtherUser = errors.New("the connection is of another user of this host: use certificates (--tls-cert, --tls-key, --tls-ca), or --insecure to receive from everybody")

// checkPeerUser refuses connections over the loopback that are not of the user
// that runs this process, nor of root. It asks the kernel whose the other end is
// (proc(5), /proc/net/tcp).
func checkPeerUser(c net.Conn) error {
	local, errLocal := netip.ParseAddrPort(c.LocalAddr().String())
	remote, errRemote := netip.ParseAddrPort(c.RemoteAddr().String())
	if err := errors.Join(errLocal, errRemote); err != nil {
		return err
	}
	for _, path := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		uid, found, err := socketUser(path, remote, local)
		if err != nil {
			return fmt.Errorf("whose the connection is: %w", err)
		}
		if found && (uid == 0 || uid == os.Getuid()) {
			return nil
		}
	}
	return errOtherUser
}

// socketUser looks for the user of a connected socket in a table of the kernel.
func socketUser(path string, local, remote netip.AddrPort) (uid int, found bool, err error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return 0, false, nil // a kernel without IPv6
	}
	if err != nil {
		return 0, false, err
	}
	defer func() { _ = f.Close() }() // it was only read
	return findSocket(f, local, remote)
}

// findSocket looks for a socket in a table. One that nobody holds any more has
// lost its user, and is none.
func findSocket(table io.Reader, local, remote netip.AddrPort) (uid int, found bool, err error) {
	const established, nobody = "01", "0"
	lines := bufio.NewScanner(table)
	for lines.Scan() {
		// sl local remote st queues timer retransmits uid timeout inode
		words := strings.Fields(lines.Text())
		if len(words) < 10 || words[3] != established || words[9] == nobody {
			continue
		}
		if parseSocket(words[1]) != unmap(local) || parseSocket(words[2]) != unmap(remote) {
			continue
		}
		uid, err := strconv.Atoi(words[7])
		return uid, err == nil, err
	}
	return 0, false, lines.Err()
}

// parseSocket reads an address of the table: words of 32 bits in the byte order
// of the host, and a port. It returns the zero value for anything else.
func parseSocket(s string) netip.AddrPort {
	address, port, _ := strings.Cut(s, ":")
	b, err := hex.DecodeString(address)
	n, errPort := strconv.ParseUint(port, 16, 16)
	if err != nil || errPort != nil || len(b) != 4 && len(b) != 16 {
		return netip.AddrPort{}
	}
	for i := 0; i < len(b); i += 4 {
		binary.BigEndian.PutUint32(b[i:], binary.LittleEndian.Uint32(b[i:]))
	}
	ip, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(ip.Unmap(), uint16(n))
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}
