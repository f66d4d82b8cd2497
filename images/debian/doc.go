// Package debian fetches and unpacks Debian packages without installing them.
//
//	apt's own sources --(names the mirror)--> private configuration
//	                                            |
//	        apt-get update, apt-get download <--+   signatures checked by apt
//	                                            v
//	   <cache>/apt/archives/*.deb --dpkg-deb -x--> <cache>/debian/<package>/
//
// The mirror is the one that the machine's own apt configuration names for
// Debian; the suites are Debian 12's, with backports. The system's sources,
// lists, archives and hooks are neither changed nor run. An [Archive] may be
// used by several goroutines and processes at once: work on the lists and on
// each unpacked package is serialized by file locks, and what exists under its
// final name is complete.
//
// Interfaces used: apt.conf(5), apt-get(8), apt-cache(8), dpkg-deb(1).
package debian
