package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Names of the authority's files.
const (
	CACert = "ca.crt"
	CAKey  = "ca.key"
)

// ErrExists is wrapped when a file that is to be made exists.
var ErrExists = errors.New("exists already")

// DefaultLife is how long certificates are valid unless told otherwise.
const (
	DefaultCALife   = 10 * 365 * 24 * time.Hour
	DefaultHostLife = 2 * 365 * 24 * time.Hour
)

// skew is how far clocks of hosts may differ.
const skew = time.Hour

// Bounds of what a certificate is made for.
const (
	MaxHosts = 32
	maxName  = 253 // RFC 1035 2.3.4
)

// Init makes an authority: its certificate and key, in a folder that it makes if
// need be. It refuses to replace either.
func Init(dir, name string, life time.Duration) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	template, err := newTemplate(name, life)
	if err != nil {
		return err
	}
	template.IsCA, template.BasicConstraintsValid, template.MaxPathLenZero = true, true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	return writePair(filepath.Join(dir, CACert), filepath.Join(dir, CAKey), der, key)
}

// Host makes a certificate and key for a host, NAME.crt and NAME.key beside the
// authority's. It is for name, and for all of also: names and addresses by which
// others connect to it.
func Host(dir, name string, also []string, life time.Duration) (cert, key string, err error) {
	if err := checkFileName(name); err != nil {
		return "", "", err
	}
	ca, caKey, err := loadAuthority(dir)
	if err != nil {
		return "", "", err
	}
	template, err := newTemplate(name, life)
	if err != nil {
		return "", "", err
	}
	if template.NotAfter.After(ca.NotAfter) {
		template.NotAfter = ca.NotAfter
	}
	if !template.NotAfter.After(time.Now()) {
		return "", "", fmt.Errorf("authority %s has expired: make another in a new folder with 'ditto pki init'", filepath.Join(dir, CACert))
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	if err := addHosts(template, append([]string{name}, also...)); err != nil {
		return "", "", err
	}
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", fmt.Errorf("host certificate: %w", err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, own.Public(), caKey)
	if err != nil {
		return "", "", fmt.Errorf("host certificate: %w", err)
	}
	cert, key = filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	return cert, key, writePair(cert, key, der, own)
}

// checkFileName accepts a name that makes a file, and not the authority's.
func checkFileName(name string) error {
	if name == "" || len(name) > maxName || name == "ca" || strings.ContainsAny(name, "/\x00") || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "-") {
		return fmt.Errorf("%q cannot be the name of a host: use its host name or address", name)
	}
	return nil
}

// addHosts makes a certificate one for these names and addresses, each once.
func addHosts(template *x509.Certificate, hosts []string) error {
	if len(hosts) > MaxHosts {
		return fmt.Errorf("%d names are more than %d for one host", len(hosts), MaxHosts)
	}
	seen := map[string]bool{}
	for _, host := range hosts {
		if seen[host] {
			continue
		}
		seen[host] = true
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
			continue
		}
		if !validHost(host) {
			return fmt.Errorf("%q is neither a host name nor an IP address", host)
		}
		template.DNSNames = append(template.DNSNames, host)
	}
	return nil
}

// validHost accepts names of hosts (RFC 1123 2.1).
func validHost(name string) bool {
	if name == "" || len(name) > maxName {
		return false
	}
	for _, label := range strings.Split(name, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return false
			}
		}
	}
	return true
}

func newTemplate(name string, life time.Duration) (*x509.Certificate, error) {
	if life <= 0 {
		return nil, fmt.Errorf("a certificate that is valid for %s: use at least a day", life)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-skew), NotAfter: now.Add(life),
	}, nil
}

// loadAuthority reads the authority in a folder.
func loadAuthority(dir string) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	fail := func(err error) (*x509.Certificate, *ecdsa.PrivateKey, error) {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: make one with 'ditto pki init'", err)
		}
		return nil, nil, fmt.Errorf("authority: %w", err)
	}
	certPath, keyPath := filepath.Join(dir, CACert), filepath.Join(dir, CAKey)
	text, err := readPEM(certPath)
	if err != nil {
		return fail(err)
	}
	certs, err := parseCertificates(text)
	if err != nil {
		return fail(fmt.Errorf("%s: %w", certPath, err))
	}
	if !certs[0].IsCA {
		return fail(fmt.Errorf("%s is not the certificate of an authority", certPath))
	}
	text, err = readPEM(keyPath)
	if err != nil {
		return fail(err)
	}
	if err := private(keyPath); err != nil {
		return fail(err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return fail(fmt.Errorf("%s has no key", keyPath))
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return fail(fmt.Errorf("%s: %w", keyPath, err))
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(certs[0].PublicKey) {
		return fail(fmt.Errorf("%s is not the key of %s", keyPath, certPath))
	}
	return certs[0], key, nil
}

// parseCertificates reads all certificates of a PEM text; there is at least one.
func parseCertificates(text []byte) (certs []*x509.Certificate, err error) {
	for len(text) > 0 {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, errors.New("there is no certificate (BEGIN CERTIFICATE)")
	}
	return certs, nil
}

// writePair writes a certificate and its key, neither over a file that exists.
// What fails leaves nothing.
func writePair(certPath, keyPath string, der []byte, key *ecdsa.PrivateKey) error {
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("private key: %w", err)
	}
	if _, err := os.Lstat(certPath); err == nil {
		return fmt.Errorf("%s %w", certPath, ErrExists)
	}
	if err := writeNew(keyPath, &pem.Block{Type: "PRIVATE KEY", Bytes: secret}); err != nil {
		return err
	}
	if err := writeNew(certPath, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
		return errors.Join(err, os.Remove(keyPath))
	}
	return nil
}

// writeNew makes a file that only its user may read.
func writeNew(path string, block *pem.Block) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s %w", path, ErrExists)
	}
	if err != nil {
		return fmt.Errorf("certificate file: %w", err)
	}
	var text bytes.Buffer
	err = pem.Encode(&text, block)
	if err == nil {
		_, err = f.Write(text.Bytes())
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(fmt.Errorf("certificate file: %w", err), os.Remove(path))
	}
	return nil
}
