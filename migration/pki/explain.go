package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"reflect"
	"syscall"
)

// ErrTLS is wrapped by what [Explain] explained.
var ErrTLS = errors.New("TLS")

// Alerts that a peer sends when it does not like a certificate (RFC 8446 6.2).
const (
	alertBadCertificate      = 42
	alertUnsupportedCert     = 43
	alertRevoked             = 44
	alertExpired             = 45
	alertUnknown             = 46
	alertUnknownCA           = 48
	alertAccessDenied        = 49
	alertProtocolVersion     = 70
	alertCertificateRequired = 116
)

// Explain puts into words why a connection of TLS failed, and what to do. What it
// does not know it returns as it is. An error that has nothing to do with TLS is
// returned unchanged.
func Explain(err error) error {
	if err == nil || errors.Is(err, ErrTLS) {
		return err
	}
	if words := verification(err); words != "" {
		return fmt.Errorf("%w: %s (%w)", ErrTLS, words, err)
	}
	if alert, ok := alertOf(err); ok {
		return fmt.Errorf("%w: %s (%w)", ErrTLS, alertWords(alert), err)
	}
	var header tls.RecordHeaderError
	if errors.As(err, &header) {
		return fmt.Errorf("%w: the other side does not speak TLS: give both sides --tls-cert, --tls-key and --tls-ca, or neither (%w)", ErrTLS, err)
	}
	return err
}

// alertOf returns the alert that a peer sent. Package crypto/tls has it in an
// error of network operations, as a number whose type it keeps for itself.
func alertOf(err error) (uint8, bool) {
	var remote *net.OpError
	if !errors.As(err, &remote) || remote.Op != "remote error" {
		return 0, false
	}
	number := reflect.ValueOf(remote.Err)
	if number.Kind() != reflect.Uint8 {
		return 0, false
	}
	return uint8(number.Uint()), true
}

// Handshake explains the failure of a handshake, in which a peer that hangs up
// most likely speaks no TLS.
func Handshake(err error) error {
	explained := Explain(err)
	switch {
	case err == nil || errors.Is(explained, ErrTLS):
		return explained
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, net.ErrClosed):
		return fmt.Errorf("%w: the other side hung up: does it use --tls-cert, --tls-key and --tls-ca too? (%w)", ErrTLS, err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("%w: the other side does not answer: does it use --tls-cert, --tls-key and --tls-ca too? (%w)", ErrTLS, err)
	}
	return fmt.Errorf("%w: %w", ErrTLS, err)
}

// verification is what is wrong with the peer's certificate, as this side sees
// it.
func verification(err error) string {
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	var name x509.HostnameError
	switch {
	case errors.As(err, &unknown):
		return "the peer's certificate was not signed by an authority of --tls-ca: use certificates of one authority on both sides"
	case errors.As(err, &name):
		return "the peer's certificate is for another host: connect by a name that is in it, give --tls-server-name, or make one with 'ditto pki host'"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "the peer's certificate has expired or is not valid yet: renew it with 'ditto pki host', and compare the clocks"
	case errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
		return "the peer's certificate may not be used for this side of a connection: it needs both server and client authentication"
	case errors.As(err, &invalid):
		return "the peer's certificate is not valid"
	}
	return ""
}

// alertWords is what is wrong as the peer sees it.
func alertWords(alert uint8) string {
	switch alert {
	case alertUnknownCA:
		return "the peer does not know the authority of this host's certificate: use certificates of one authority on both sides"
	case alertExpired:
		return "the peer says that this host's certificate has expired: renew it with 'ditto pki host', and compare the clocks"
	case alertCertificateRequired:
		return "the peer wants a certificate of this host: give --tls-cert, --tls-key and --tls-ca"
	case alertProtocolVersion:
		return "the peer does not speak TLS 1.3"
	case alertBadCertificate, alertUnsupportedCert, alertRevoked, alertUnknown, alertAccessDenied:
		return "the peer refuses this host's certificate: its own message tells why"
	}
	return "the peer ended the connection"
}
