// Package doctor tells what a host can do for ditto, and what to do where it
// cannot.
//
//	/proc, /sys, /dev --read--> checks --> Report: Finding{status, value, cure}
//	KVM, memory, kernel --probe--^
//
// Everything is found out by trying the thing itself where that is cheap and
// harmless, and by what the kernel says about itself otherwise. Nothing is
// changed. A [Host] reads files below a root, so that tests can be other hosts.
package doctor
