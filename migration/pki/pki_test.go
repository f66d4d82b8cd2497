package pki

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// authority makes a CA and hosts with certificates of it.
func authority(t *testing.T, hosts ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "pki")
	if err := Init(dir, "test", DefaultCALife); err != nil {
		t.Fatal(err)
	}
	for _, h := range hosts {
		if _, _, err := Host(dir, h, []string{"127.0.0.1", "::1", h}, DefaultHostLife); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func load(t *testing.T, dir, host, ca string) Credentials {
	t.Helper()
	c, err := Load(filepath.Join(dir, host+".crt"), filepath.Join(dir, host+".key"), filepath.Join(ca, CACert))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestFiles(t *testing.T) {
	dir := authority(t, "a.example", "10.1.2.3")
	for _, name := range []string{CACert, CAKey, "a.example.crt", "a.example.key", "10.1.2.3.crt"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	before, err := os.ReadFile(filepath.Join(dir, CAKey))
	if err != nil {
		t.Fatal(err)
	}
	if err := Init(dir, "again", DefaultCALife); !errors.Is(err, ErrExists) {
		t.Errorf("an authority was replaced: %v", err)
	}
	if _, _, err := Host(dir, "a.example", nil, DefaultHostLife); !errors.Is(err, ErrExists) {
		t.Errorf("a host's key was replaced: %v", err)
	}
	if after, err := os.ReadFile(filepath.Join(dir, CAKey)); err != nil || string(after) != string(before) {
		t.Errorf("the key changed, %v", err)
	}
	// A certificate without its key is not replaced either, and leaves no key.
	if err := os.Remove(filepath.Join(dir, "a.example.key")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Host(dir, "a.example", nil, DefaultHostLife); !errors.Is(err, ErrExists) {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "a.example.key")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("half a pair is left: %v", err)
	}
	for _, name := range []string{"", "ca", "../x", "a/b", "-a", ".a", "a b", "a..b", strings.Repeat("a", 64), strings.Repeat("a.", 150) + "a"} {
		if _, _, err := Host(dir, name, nil, DefaultHostLife); err == nil {
			t.Errorf("%q was accepted", name)
		}
	}
	if _, _, err := Host(t.TempDir(), "a", nil, DefaultHostLife); err == nil || !strings.Contains(err.Error(), "ditto pki init") {
		t.Errorf("%v", err)
	}
	if err := os.Chmod(filepath.Join(dir, CAKey), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Host(dir, "b", nil, DefaultHostLife); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a key that all can read was used: %v", err)
	}
}

func TestShow(t *testing.T) {
	dir := authority(t, "a.example")
	all, err := Show(dir)
	if err != nil || len(all) != 2 {
		t.Fatalf("%v, %v", all, err)
	}
	host, ca := all[0], all[1]
	if host.Name != "a.example" || host.Authority || host.Issuer != "test" || fmt.Sprint(host.Hosts) != "[a.example 127.0.0.1 ::1]" || len(host.Fingerprint) != 64 {
		t.Errorf("%+v", host)
	}
	if !ca.Authority || ca.Name != "test" || host.Until.After(ca.Until) {
		t.Errorf("%+v", ca)
	}
	if _, err := Show(t.TempDir()); err == nil || !strings.Contains(err.Error(), "ditto pki init") {
		t.Errorf("%v", err)
	}
	if _, err := Show(filepath.Join(dir, CAKey)); err == nil {
		t.Error("a key was shown as a certificate")
	}
}

func TestLoad(t *testing.T) {
	dir, other := authority(t, "a"), authority(t, "b")
	cert, key, ca := filepath.Join(dir, "a.crt"), filepath.Join(dir, "a.key"), filepath.Join(dir, CACert)
	long := filepath.Join(dir, "long")
	if err := os.WriteFile(long, make([]byte, MaxPEM+1), 0o600); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(dir, "open")
	text, err := os.ReadFile(key)
	if err == nil {
		err = os.WriteFile(open, text, 0o600)
	}
	if err == nil {
		err = os.Chmod(open, 0o640)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ cert, key, ca, want string }{
		{cert, key, ca, ""},
		{cert, filepath.Join(other, "b.key"), ca, "private key does not match"},
		{key, key, ca, "the certificate and its key"},
		{cert, key, key, "no certificate of an authority"},
		{filepath.Join(dir, "gone"), key, ca, "no such file"},
		{cert, long, ca, "longer than"},
		{cert, open, ca, "chmod 600"},
	} {
		_, err := Load(test.cert, test.key, test.ca)
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: %v", test, err)
		}
	}
}

// ends are the errors of the two ends of a connection.
type ends struct{ server, client error }

// meet lets two ends exchange a byte each way.
func meet(t *testing.T, server, client *tls.Config) ends {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	b, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	a, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for _, c := range []net.Conn{a, b} {
		if err := c.SetDeadline(deadline); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan error, 1)
	go func() {
		var err error
		if server == nil {
			_, err = io.Copy(a, strings.NewReader("no TLS at all"))
		} else {
			err = exchange(tls.Server(a, server), true)
		}
		_ = a.(*net.TCPConn).CloseWrite() // a reset would overtake what was said
		_, _ = io.Copy(io.Discard, a)
		_ = a.Close()
		done <- err
	}()
	if client == nil {
		_, err = b.Write([]byte("no TLS at all"))
		if err == nil {
			_, err = io.ReadAll(b)
		}
	} else {
		err = exchange(tls.Client(b, client), false)
	}
	_ = b.Close()
	return ends{<-done, err}
}

func exchange(c *tls.Conn, server bool) error {
	if err := c.HandshakeContext(context.Background()); err != nil {
		return Handshake(err)
	}
	if server {
		_, err := c.Write([]byte{1})
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return Explain(err)
}

// TestHandshake: only hosts of one authority, under the right names and times,
// talk to each other, and each side says why not.
func TestHandshake(t *testing.T) {
	ours, theirs := authority(t, "a", "b"), authority(t, "x")
	expired := authority(t)
	past := expiredHost(t, expired)
	tlsOf := func(c Credentials, name string) *tls.Config {
		t.Helper()
		var config *tls.Config
		var err error
		if name == "" {
			config, err = c.Server()
		} else {
			config, err = c.Client(name)
		}
		if err != nil {
			t.Fatal(err)
		}
		return config
	}
	b, a := load(t, ours, "b", ours), load(t, ours, "a", ours)
	anonymous := tlsOf(a, "b")
	anonymous.Certificates = nil
	old := tlsOf(a, "b")
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	for name, test := range map[string]struct {
		server, client             *tls.Config
		wantServer, wantClient     string
		clientWorks, serverWorks   bool
		clientUnwrap, serverUnwrap error
	}{
		"good":                    {server: tlsOf(b, ""), client: tlsOf(a, "b"), clientWorks: true, serverWorks: true},
		"good by address":         {server: tlsOf(b, ""), client: tlsOf(a, "127.0.0.1"), clientWorks: true, serverWorks: true},
		"another name":            {server: tlsOf(b, ""), client: tlsOf(a, "c"), wantClient: "is for another host", wantServer: "refuses this host's certificate"},
		"server of another CA":    {server: tlsOf(load(t, theirs, "x", ours), ""), client: tlsOf(a, "x"), wantClient: "not signed by an authority of --tls-ca", wantServer: "refuses this host's certificate"},
		"client of another CA":    {server: tlsOf(b, ""), client: tlsOf(load(t, theirs, "x", ours), "b"), wantServer: "not signed by an authority of --tls-ca", wantClient: "does not know the authority"},
		"client without one":      {server: tlsOf(b, ""), client: anonymous, wantServer: "TLS", wantClient: "wants a certificate"},
		"client has expired":      {server: tlsOf(load(t, expired, past, expired), ""), client: tlsOf(load(t, expired, past, expired), past), wantClient: "has expired", wantServer: "refuses this host's certificate"},
		"TLS 1.2":                 {server: tlsOf(b, ""), client: old, wantServer: "TLS", wantClient: "does not speak TLS 1.3"},
		"server speaks no TLS":    {client: tlsOf(a, "b"), wantClient: "does not speak TLS", serverWorks: true},
		"client speaks no TLS":    {server: tlsOf(b, ""), wantServer: "does not speak TLS", clientWorks: true},
		"certificate for serving": {server: tlsOf(b, ""), client: tlsOf(servingOnly(t, ours), "b"), wantServer: "both server and client", wantClient: "refuses this host's certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			got := meet(t, test.server, test.client)
			if (got.client == nil) != test.clientWorks && test.client != nil || got.client != nil && !strings.Contains(got.client.Error(), test.wantClient) {
				t.Errorf("client: %v, want %q", got.client, test.wantClient)
			}
			if (got.server == nil) != test.serverWorks && test.server != nil || got.server != nil && !strings.Contains(got.server.Error(), test.wantServer) {
				t.Errorf("server: %v, want %q", got.server, test.wantServer)
			}
			if got.server != nil && !errors.Is(got.server, ErrTLS) && test.server != nil {
				t.Errorf("server: %v is not said to be of TLS", got.server)
			}
		})
	}
}

// expiredHost makes a certificate that ended yesterday.
func expiredHost(t *testing.T, dir string) string {
	t.Helper()
	ca, caKey, err := loadAuthority(dir)
	if err != nil {
		t.Fatal(err)
	}
	template, err := newTemplate("past", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	template.NotBefore, template.NotAfter = time.Now().Add(-48*time.Hour), time.Now().Add(-24*time.Hour)
	template.DNSNames = []string{"past"}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	sign(t, dir, "past", template, ca, caKey)
	return "past"
}

// servingOnly is a certificate of the kind that web servers have.
func servingOnly(t *testing.T, dir string) Credentials {
	t.Helper()
	ca, caKey, err := loadAuthority(dir)
	if err != nil {
		t.Fatal(err)
	}
	template, err := newTemplate("web", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	template.DNSNames = []string{"web"}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	sign(t, dir, "web", template, ca, caKey)
	return load(t, dir, "web", dir)
}

// TestClientName: a peer without a name cannot be checked.
func TestClientName(t *testing.T) {
	dir := authority(t, "a")
	if _, err := load(t, dir, "a", dir).Client(""); err == nil {
		t.Error("any peer would do")
	}
	if err := Explain(io.ErrClosedPipe); err != io.ErrClosedPipe { //nolint:errorlint // it must be the same
		t.Errorf("%v", err)
	}
	if err := errors.Join(Explain(nil), Handshake(nil)); err != nil {
		t.Error(err)
	}
}

// sign makes files of a certificate.
func sign(t *testing.T, dir, name string, template, ca *x509.Certificate, caKey *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, key.Public(), caKey)
	if err == nil {
		err = writePair(filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key"), der, key)
	}
	if err != nil {
		t.Fatal(err)
	}
}
