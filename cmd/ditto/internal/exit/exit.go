// Package exit lists the exit codes of the ditto command. They are part of its
// interface: a code never changes its meaning.
package exit

import "fmt"

// The exit codes.
const (
	OK         = 0  // done; the guest powered itself off
	Failure    = 1  // anything without a code of its own
	Usage      = 2  // a flag, argument or configuration file is wrong
	NoKVM      = 3  // there is no /dev/kvm
	Permission = 4  // no permission, for example on /dev/kvm
	NoLinux    = 5  // this KVM cannot run Linux kernels
	Kernel     = 6  // the kernel or initrd is missing or cannot be booted
	Disk       = 7  // a disk is missing, locked or unusable
	Net        = 8  // a network, tap device or host port cannot be had
	NameInUse  = 9  // a machine of that name runs already
	Panicked   = 10 // the guest's kernel panicked
	GuestError = 11 // the guest did what the machine cannot do
	Killed     = 12 // the guest was killed before it powered off
	NotFound   = 13 // no machine of that name runs
	Sandbox    = 14 // the process could not drop its rights
	Memory     = 15 // guest memory cannot be had
	Tracker    = 16 // the tracker asked for cannot be had
	Snapshot   = 17 // a snapshot is missing, damaged, or cannot be written
	Migration  = 18 // a migration failed; the machine is where it was
	InDoubt    = 19 // a migration's outcome is not known; the machine stands still
)

// Meaning is one exit code and what it says.
type Meaning struct {
	Code int
	Text string
}

// Meanings returns the codes in order, for help texts and manuals.
func Meanings() []Meaning {
	return []Meaning{
		{OK, "done; for run: the guest powered itself off"},
		{Failure, "failed for a reason without a code of its own"},
		{Usage, "a flag, an argument or the configuration file is wrong"},
		{NoKVM, "there is no /dev/kvm"},
		{Permission, "no permission, for example on /dev/kvm"},
		{NoLinux, "this KVM cannot run Linux kernels"},
		{Kernel, "the kernel or the initrd is missing or cannot be booted"},
		{Disk, "a disk is missing, locked or unusable"},
		{Net, "a network, a tap device or a host port cannot be had"},
		{NameInUse, "a machine of that name is running"},
		{Panicked, "the guest's kernel panicked"},
		{GuestError, "the guest did what the machine cannot do"},
		{Killed, "the guest was killed before it powered off"},
		{NotFound, "no machine of that name is running"},
		{Sandbox, "the machine's process could not drop its rights"},
		{Memory, "guest memory cannot be had"},
		{Tracker, "the tracker asked for cannot be had"},
		{Snapshot, "a snapshot is missing, damaged, of another machine, or cannot be written"},
		{Migration, "a migration failed; the machine runs where it ran"},
		{InDoubt, "the outcome of a migration is not known; the machine stands still where it was"},
	}
}

// Error is an error that decides the exit code.
type Error struct {
	Code int
	Err  error
}

// New returns an error with a code, unless err is nil.
func New(code int, err error) error {
	if err == nil {
		return nil
	}
	return &Error{code, err}
}

// Errorf is New with a formatted error.
func Errorf(code int, format string, args ...any) error {
	return &Error{code, fmt.Errorf(format, args...)}
}

// Error implements error.
func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns the error.
func (e *Error) Unwrap() error { return e.Err }
