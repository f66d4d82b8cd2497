package kvm

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// withoutSignals calls f on a thread that gets no signals meanwhile. They wait,
// those of the Go scheduler among them, so f must be short.
func withoutSignals(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all, old unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &old); err != nil {
		return fmt.Errorf("block signals: %w", err)
	}
	err := f()
	if masked := unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil); masked != nil {
		err = errors.Join(err, fmt.Errorf("unblock signals: %w", masked))
	}
	return err
}
