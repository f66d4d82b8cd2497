package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/netd"
)

// peer is the socket to the VM: a connection that was inherited, or a
// listener that serves the first one.
type peer struct {
	listener net.Listener

	mu     sync.Mutex
	conn   net.Conn
	closed bool
}

// openPeer takes the inherited socket or creates the one that is asked for.
func openPeer(config netd.Config) (*peer, error) {
	if config.Listen != "" {
		listener, err := net.Listen("unix", config.Listen)
		if err != nil {
			if errors.Is(err, unix.EADDRINUSE) {
				return nil, fmt.Errorf("listen on %s: the path exists: remove it when nobody uses it", config.Listen)
			}
			return nil, fmt.Errorf("listen on %s: %w", config.Listen, err)
		}
		return &peer{listener: listener}, nil
	}
	kind, err := unix.GetsockoptInt(config.FD, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || kind != unix.SOCK_STREAM {
		return nil, fmt.Errorf("--fd %d: not a connected stream socket", config.FD)
	}
	file := os.NewFile(uintptr(config.FD), "vm")
	defer func() { _ = file.Close() }() // FileConn duplicates it
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, fmt.Errorf("--fd %d: %w", config.FD, err)
	}
	return &peer{conn: conn}, nil
}

// accept returns the connection to the VM, waiting for it when the socket was
// created here.
func (p *peer) accept() (net.Conn, error) {
	if p.listener == nil {
		return p.conn, nil
	}
	conn, err := p.listener.Accept()
	if err != nil {
		return nil, fmt.Errorf("wait for the VM: %w", err)
	}
	_ = p.listener.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		_ = conn.Close()
	}
	p.conn = conn
	return conn, nil
}

// close ends the connection, or the wait for it.
func (p *peer) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	if p.listener != nil {
		_ = p.listener.Close()
	}
	if p.conn != nil {
		_ = p.conn.Close()
	}
}
