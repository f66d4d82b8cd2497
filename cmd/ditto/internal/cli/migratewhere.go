package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"ditto.vm/cmd/ditto/internal/exit"
)

// DefaultPort is where machines are received unless told otherwise.
const DefaultPort = "7788"

// destination is where a machine is to go.
type destination struct {
	text string
	// Of tcp://: host and port.
	address, host string
	// Of ssh://: what is executed, "" for tcp.
	ssh []string
}

// parseDestination reads tcp://HOST[:PORT] or ssh://[USER@]HOST[:PORT][/PATH/OF/DITTO].
func parseDestination(text, sshProgram string, receive []string) (destination, error) {
	fail := func(what string) (destination, error) {
		return destination{}, exit.Errorf(exit.Usage, "destination %q: %s: use tcp://HOST[:PORT] or ssh://[USER@]HOST[:PORT][/PATH/OF/DITTO]", text, what)
	}
	u, err := url.Parse(text)
	if err != nil {
		return fail("it is no address")
	}
	host, port := u.Hostname(), u.Port()
	switch {
	case u.Scheme != "tcp" && u.Scheme != "ssh":
		return fail("how to get there is missing")
	case host == "" || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "" || strings.ContainsFunc(text, unprintable):
		return fail("there is no host in it")
	}
	d := destination{text: text, host: host}
	if u.Scheme == "tcp" {
		if u.User != nil || u.Path != "" && u.Path != "/" {
			return fail("there is more than a host and a port")
		}
		if len(receive) > 0 {
			return destination{}, exit.Errorf(exit.Usage, "--receive is for ssh://: over tcp:// the receiver was started with what it needs")
		}
		if port == "" {
			port = DefaultPort
		}
		d.address = net.JoinHostPort(host, port)
		return d, nil
	}
	if _, has := u.User.Password(); has {
		return fail("a password does not belong there")
	}
	// A word that begins with "-" would be an option of ssh (CVE-2017-1000117).
	if strings.HasPrefix(host, "-") || strings.HasPrefix(u.User.Username(), "-") {
		return fail("a host or user that begins with -")
	}
	d.ssh = append(strings.Fields(sshProgram), "-T")
	if port != "" {
		d.ssh = append(d.ssh, "-p", port)
	}
	if user := u.User.Username(); user != "" {
		d.ssh = append(d.ssh, "-l", user)
	}
	program := strings.TrimSuffix(u.Path, "/")
	if program == "" {
		program = "ditto"
	}
	remote := append([]string{program, "receive", "--stdio"}, receive...)
	d.ssh = append(d.ssh, host, shellQuote(remote))
	return d, nil
}

func unprintable(r rune) bool { return r <= ' ' || r == 0x7f }

// caller makes connections to a destination.
type caller struct {
	destination
	plainAllowed bool // over networks
	stderr       *os.File

	mu      sync.Mutex // guards what follows
	running []*exec.Cmd
	refused bool // a connection, since it is not encrypted
}

// dial makes one, as a socket that can be lent.
func (c *caller) dial(ctx context.Context) (*os.File, error) {
	if len(c.ssh) > 0 {
		return c.dialSSH()
	}
	var dialer net.Dialer
	dialer.SetMultipathTCP(false)
	conn, err := dialer.DialContext(ctx, "tcp", c.address)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }() // the file is a copy
	tcp := conn.(*net.TCPConn)
	if remote := tcp.RemoteAddr().(*net.TCPAddr); !remote.IP.IsLoopback() && !c.plainAllowed {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.refused = true
		return nil, errPlain
	}
	return tcp.File()
}

// errPlain refuses what everybody could read.
var errPlain = errors.New("the way there is a network, and nothing is encrypted: give --tls-cert, --tls-key and --tls-ca ('ditto pki' makes them), use ssh://, or say --insecure")

// dialSSH starts ssh with one end of a pair of sockets, and returns the other.
func (c *caller) dialSSH() (*os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket for ssh: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ssh"), os.NewFile(uintptr(fds[1]), "ssh")
	defer func() { _ = theirs.Close() }()       // ssh has its own
	cmd := exec.Command(c.ssh[0], c.ssh[1:]...) //nolint:gosec // the user's own words
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, c.stderr
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("ssh: %w", err), ours.Close())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.running = append(c.running, cmd)
	return ours, nil
}

// close waits for the processes that were started. They end when the machine has
// closed what it was lent.
func (c *caller) close() {
	c.mu.Lock()
	running := c.running
	c.running = nil
	c.mu.Unlock()
	for _, cmd := range running {
		_ = cmd.Wait() // what went wrong, the machine has noticed
	}
}
