package pki

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Certificate describes one for people.
type Certificate struct {
	Path string `json:"path"`
	Name string `json:"name"`
	// Authority says that it signs others; Issuer who signed it.
	Authority bool   `json:"authority"`
	Issuer    string `json:"issuer"`
	// Hosts are the names and addresses that it is for.
	Hosts []string  `json:"hosts"`
	From  time.Time `json:"from"`
	Until time.Time `json:"until"`
	// Fingerprint is the SHA-256 digest of the certificate in hexadecimal.
	Fingerprint string `json:"fingerprint"`
}

// Show describes the first certificate of a file, or those of all files NAME.crt
// in a folder.
func Show(path string) ([]Certificate, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	paths := []string{path}
	if info.IsDir() {
		entries, err := os.ReadDir(path)
		if err != nil {
			return nil, fmt.Errorf("certificates: %w", err)
		}
		paths = nil
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), ".crt") && e.Type().IsRegular() {
				paths = append(paths, filepath.Join(path, e.Name()))
			}
		}
		if len(paths) == 0 {
			return nil, fmt.Errorf("%s has no certificates: make an authority with 'ditto pki init'", path)
		}
	}
	slices.Sort(paths)
	var out []Certificate
	for _, p := range paths {
		c, err := showOne(p)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p, err)
		}
		out = append(out, c)
	}
	return out, nil
}

func showOne(path string) (Certificate, error) {
	text, err := readPEM(path)
	if err != nil {
		return Certificate{}, err
	}
	certs, err := parseCertificates(text)
	if err != nil {
		return Certificate{}, err
	}
	c := certs[0]
	hosts := slices.Clone(c.DNSNames)
	for _, ip := range c.IPAddresses {
		hosts = append(hosts, ip.String())
	}
	digest := sha256.Sum256(c.Raw)
	return Certificate{
		Path: path, Name: c.Subject.CommonName, Authority: c.IsCA, Issuer: c.Issuer.CommonName,
		Hosts: hosts, From: c.NotBefore, Until: c.NotAfter, Fingerprint: hex.EncodeToString(digest[:]),
	}, nil
}
