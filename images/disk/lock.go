package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Permissions on an image, numbered as QEMU's BLK_PERM_*. Who uses permission
// i holds a shared lock on byte 100+i, who does not let others use it one on
// byte 200+i (QEMU block/file-posix.c).
const (
	permRead   = 1 << 0
	permWrite  = 1 << 1
	permResize = 1 << 3

	permCount    = 4
	permBase     = 100
	unsharedBase = 200
)

// lock takes the lock bytes for perm and unshared, and then checks that nobody
// else forbids perm or uses what is unshared. On failure no byte stays locked.
// The order makes two openers at once fail rather than both succeed.
func lock(fd int, perm, unshared int) error {
	err := applyLocks(fd, perm, unshared)
	if err == nil {
		err = checkLocks(fd, perm, unshared)
	}
	if err != nil {
		// Closing the file would release them too.
		_ = setLock(fd, unix.F_UNLCK, 0, unsharedBase+permCount)
	}
	return err
}

func applyLocks(fd int, perm, unshared int) error {
	for i := range permCount {
		if perm&(1<<i) != 0 {
			if err := setLock(fd, unix.F_RDLCK, int64(permBase+i), 1); err != nil {
				return err
			}
		}
		if unshared&(1<<i) != 0 {
			if err := setLock(fd, unix.F_RDLCK, int64(unsharedBase+i), 1); err != nil {
				return err
			}
		}
	}
	return nil
}

func checkLocks(fd int, perm, unshared int) error {
	for i := range permCount {
		if perm&(1<<i) != 0 {
			if err := testLock(fd, int64(unsharedBase+i)); err != nil {
				return err
			}
		}
		if unshared&(1<<i) != 0 {
			if err := testLock(fd, int64(permBase+i)); err != nil {
				return err
			}
		}
	}
	return nil
}

func setLock(fd int, kind int16, start, n int64) error {
	lk := unix.Flock_t{Type: kind, Whence: unix.SEEK_SET, Start: start, Len: n}
	for {
		err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lk)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
			return ErrLocked
		case err != nil:
			return fmt.Errorf("lock byte %d: %w", start, err)
		}
		return nil
	}
}

// testLock fails when another open file holds any lock on the byte.
func testLock(fd int, start int64) error {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: start, Len: 1}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lk); err != nil {
		return fmt.Errorf("test lock byte %d: %w", start, err)
	}
	if lk.Type != unix.F_UNLCK {
		return ErrLocked
	}
	return nil
}

// lockError explains why a lock cannot be had, and by whom if that shows.
func lockError(path string, fd int, o Options, err error) error {
	if !errors.Is(err, ErrLocked) {
		return &Error{Path: path, Err: err, Reason: "cannot be locked: " + err.Error(), Cure: "move it to a file system with POSIX locks"}
	}
	e := &Error{Path: path, Err: err, Reason: "is in use by another process", Cure: "stop that process, or use a copy"}
	if !o.ReadOnly {
		e.Cure = "stop that process, use a copy, or let both open it read-only"
	}
	if holders := openers(fd); len(holders) > 0 {
		e.Reason = "is in use by " + strings.Join(holders, ", ")
	}
	return e
}

// openers lists the other processes that have the same file open, as far as
// /proc lets this one see them. OFD locks themselves do not name a process.
func openers(fd int) []string {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return nil
	}
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return nil
	}
	var out []string
	self, last := strconv.Itoa(os.Getpid()), ""
	for _, link := range links {
		pid := strings.Split(link, "/")[2]
		if pid == self || pid == last {
			continue
		}
		var other unix.Stat_t
		if unix.Stat(link, &other) != nil || other.Dev != st.Dev || other.Ino != st.Ino {
			continue
		}
		last = pid // links of one process come together
		name, _ := os.ReadFile("/proc/" + pid + "/comm")
		out = append(out, fmt.Sprintf("process %s (%s)", pid, strings.TrimSpace(string(name))))
	}
	return out
}
