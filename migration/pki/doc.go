// Package pki lets two hosts know each other: mutual TLS 1.3 for migrations, and
// a small certificate authority for those who have none.
//
//	pki init            pki host a 10.0.0.1        pki host b 10.0.0.2
//	ca.crt  ca.key ---> a.crt  a.key               b.crt  b.key
//	                        \                        /
//	   source: a.* + ca.crt   <--- mutual TLS --->   destination: b.* + ca.crt
//
// [Credentials] are one host's side, as PEM (RFC 7468). Both sides show a
// certificate, and both check it: that it was signed by the authority that they
// were given (RFC 5280), that it is in its time, and, on the source, that it was
// made for the name or address that the destination was called by (RFC 6125).
// Nothing of the system's own authorities is used, no version below TLS 1.3 is
// spoken (RFC 8446), and no session is resumed.
//
// [Explain] puts into words what a failed handshake means and what to do.
//
// The keys of the authority are ECDSA P-256. Whoever has ca.key can make a
// host: it is needed on no host that only migrates.
package pki
