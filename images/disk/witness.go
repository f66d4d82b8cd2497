package disk

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// FirstWitness is the first byte that can be a witness: far behind those that
// QEMU and ditto lock, and behind the end of images.
const FirstWitness = 1 << 48

// SetWitness locks a byte of the file, from [FirstWitness] on, for as long as the
// file is open or until another is set; 0 sets none. Who else has the file open
// sees it, on this host or another, if the file system has locks for all its
// hosts. A lock does not change the file, and keeps nobody from anything.
func (r *Raw) SetWitness(at int64) error {
	if at != 0 && at < FirstWitness {
		return fmt.Errorf("disk %s: byte %d cannot be a witness", r.path, at)
	}
	if r.witness != 0 {
		if err := setLock(r.fd, unix.F_UNLCK, r.witness, 1); err != nil {
			return fmt.Errorf("disk %s: %w", r.path, err)
		}
		r.witness = 0
	}
	if at == 0 {
		return nil
	}
	if err := setLock(r.fd, unix.F_RDLCK, at, 1); err != nil {
		return fmt.Errorf("disk %s: %w", r.path, err)
	}
	r.witness = at
	return nil
}

// SeesWitness reports whether somebody else has locked this byte and not the one
// before it, which is as good as impossible to meet by chance.
func (r *Raw) SeesWitness(at int64) bool {
	return at > FirstWitness && errors.Is(testLock(r.fd, at), ErrLocked) && testLock(r.fd, at-1) == nil
}
