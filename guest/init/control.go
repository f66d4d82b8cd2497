package main

import (
	"fmt"
	"os"
	"path"
	"syscall"

	"golang.org/x/sys/unix"
)

// action is what becomes of the machine.
type action uint8

const (
	actPowerOff action = iota + 1
	actReboot
	actHalt
	actShell // keep running
)

func (a action) String() string {
	switch a {
	case actPowerOff:
		return "poweroff"
	case actReboot:
		return "reboot"
	case actHalt:
		return "halt"
	case actShell:
		return "shell"
	}
	return "none"
}

func parseAction(s string) (action, error) {
	for a := actPowerOff; a <= actShell; a++ {
		if a.String() == s {
			return a, nil
		}
	}
	return 0, fmt.Errorf("want poweroff, reboot, halt or shell")
}

// controlSignals are the requests process 1 takes, with busybox's meaning.
func controlSignals() map[os.Signal]action {
	return map[os.Signal]action{
		syscall.SIGUSR1: actHalt,
		syscall.SIGUSR2: actPowerOff,
		syscall.SIGTERM: actReboot,
		syscall.SIGINT:  actReboot, // Ctrl-Alt-Del
	}
}

// controlCommand is what the names poweroff, reboot, halt and shutdown do: ask
// process 1, or with -f tell the kernel at once.
func controlCommand(name string, args []string) int {
	act, force, err := parseControl(name, args)
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		return 2
	}
	if force {
		unix.Sync()
		err = rebootInto(act)
	} else {
		for sig, a := range controlSignals() {
			if a == act && sig != syscall.SIGINT {
				err = syscall.Kill(1, sig.(syscall.Signal))
			}
		}
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		return 1
	}
	return 0
}

func parseControl(name string, args []string) (act action, force bool, err error) {
	switch path.Base(name) {
	case "reboot":
		act = actReboot
	case "halt":
		act = actHalt
	default:
		act = actPowerOff
	}
	for _, a := range args {
		switch a {
		case "-f":
			force = true
		case "-r":
			act = actReboot
		case "-p", "-P", "-h":
			act = actPowerOff
		case "now":
		default:
			return 0, false, fmt.Errorf("usage: %s [-f] [-r|-p|-h] [now]", path.Base(name))
		}
	}
	return act, force, nil
}

// rebootInto is reboot(2). On success it does not return.
func rebootInto(a action) error {
	cmd := unix.LINUX_REBOOT_CMD_POWER_OFF
	switch a {
	case actReboot:
		cmd = unix.LINUX_REBOOT_CMD_RESTART
	case actHalt:
		cmd = unix.LINUX_REBOOT_CMD_HALT
	}
	return os.NewSyscallError("reboot", unix.Reboot(cmd))
}
