package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/lab/wire"
)

// openTerminal connects the command to a new pseudo-terminal, which becomes its
// controlling terminal (pty(7)).
func (p *process) openTerminal(rows, cols uint16) (stdin *os.File, outputs []output, theirs []*os.File, err error) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, nil, err
	}
	var n int
	err = control(master, func(fd int) error {
		if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
			return err
		}
		n, err = unix.IoctlGetInt(fd, unix.TIOCGPTN)
		return err
	})
	if err != nil {
		_ = master.Close()
		return nil, nil, nil, fmt.Errorf("unlock terminal: %w", err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		_ = master.Close()
		return nil, nil, nil, err
	}
	p.pty = master
	p.resize(rows, cols)
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = slave, slave, slave
	p.cmd.SysProcAttr.Setctty = true
	p.cmd.SysProcAttr.Ctty = 0
	return master, []output{{master, wire.Stdout}}, []*os.File{slave}, nil
}

// resize tells the terminal its size; without a terminal it does nothing.
func (p *process) resize(rows, cols uint16) {
	if p.pty == nil || rows == 0 || cols == 0 {
		return
	}
	_ = control(p.pty, func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	})
}

// control calls fn with f's descriptor and leaves f non-blocking, so that its
// deadlines keep working.
func control(f *os.File, fn func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := raw.Control(func(fd uintptr) { ferr = fn(int(fd)) }); err != nil {
		return err
	}
	return ferr
}
