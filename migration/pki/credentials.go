package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
)

// MaxPEM bounds each of the files in bytes. A chain of ten certificates fits.
const MaxPEM = 32 << 10

// Credentials are what one host shows, and what it believes, as PEM.
type Credentials struct {
	// Cert is the host's certificate, with those between it and the authority;
	// Key its private key; CA the authorities that the other side's certificate
	// may come from.
	Cert []byte `json:"cert"`
	Key  []byte `json:"key"`
	CA   []byte `json:"ca"`
}

// Load reads credentials from files and checks that they fit each other.
func Load(cert, key, ca string) (Credentials, error) {
	var c Credentials
	for _, f := range []struct {
		path string
		to   *[]byte
	}{{cert, &c.Cert}, {key, &c.Key}, {ca, &c.CA}} {
		data, err := readPEM(f.path)
		if err != nil {
			return Credentials{}, err
		}
		*f.to = data
	}
	if err := private(key); err != nil {
		return Credentials{}, err
	}
	if err := c.Check(); err != nil {
		return Credentials{}, fmt.Errorf("%s, %s, %s: %w", cert, key, ca, err)
	}
	return c, nil
}

// readPEM reads a file of bounded size.
func readPEM(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("certificate file: %w", err)
	}
	defer func() { _ = f.Close() }() // it was only read
	data, err := io.ReadAll(io.LimitReader(f, MaxPEM+1))
	if err != nil {
		return nil, fmt.Errorf("certificate file: %w", err)
	}
	if len(data) > MaxPEM {
		return nil, fmt.Errorf("certificate file %s is longer than %d bytes", path, MaxPEM)
	}
	return data, nil
}

// private refuses a key that others can read.
func private(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("private key: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("private key %s has mode %#o and others may read it: chmod 600 it", path, info.Mode().Perm())
	}
	return nil
}

// Check reports whether the credentials can be used at all.
func (c Credentials) Check() error {
	_, _, err := c.parse()
	return err
}

// parse turns PEM into what crypto/tls takes.
func (c Credentials) parse() (tls.Certificate, *x509.CertPool, error) {
	if len(c.Cert) > MaxPEM || len(c.Key) > MaxPEM || len(c.CA) > MaxPEM {
		return tls.Certificate{}, nil, fmt.Errorf("credentials of more than %d bytes", MaxPEM)
	}
	pair, err := tls.X509KeyPair(c.Cert, c.Key)
	if err != nil {
		return tls.Certificate{}, nil, fmt.Errorf("the certificate and its key: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(c.CA) {
		return tls.Certificate{}, nil, errors.New("there is no certificate of an authority (BEGIN CERTIFICATE)")
	}
	return pair, pool, nil
}

// base is what both sides have in common.
func base(pair tls.Certificate) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{pair},
		MinVersion:   tls.VersionTLS13,
		// A ticket would let a peer in without its certificate.
		SessionTicketsDisabled: true,
	}
}

// Server is the side that listens. It wants a certificate of the peer.
func (c Credentials) Server() (*tls.Config, error) {
	pair, pool, err := c.parse()
	if err != nil {
		return nil, err
	}
	config := base(pair)
	config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, pool
	return config, nil
}

// Client is the side that connects, to a peer whose certificate must be for
// name, a host name or an address.
func (c Credentials) Client(name string) (*tls.Config, error) {
	pair, pool, err := c.parse()
	if err != nil {
		return nil, err
	}
	if name == "" {
		return nil, errors.New("the name of the peer is not known, which its certificate must be for")
	}
	config := base(pair)
	config.ServerName, config.RootCAs = name, pool
	return config, nil
}
