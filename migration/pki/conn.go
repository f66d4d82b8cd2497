package pki

import "net"

// Explained is a connection of TLS whose failures are explained: a peer that does
// not like this side's certificate says so when this side has done its part of
// the handshake and reads (RFC 8446 4.4.2.4).
func Explained(c net.Conn) net.Conn { return explained{c} }

type explained struct{ net.Conn }

// Read implements net.Conn.
func (e explained) Read(p []byte) (int, error) {
	n, err := e.Conn.Read(p)
	return n, Explain(err)
}

// Write implements net.Conn.
func (e explained) Write(p []byte) (int, error) {
	n, err := e.Conn.Write(p)
	return n, Explain(err)
}
