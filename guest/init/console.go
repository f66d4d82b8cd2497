package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// logger writes the program's lines. They are whole lines in one write, so
// that lines of the kernel and of commands do not cut them.
type logger struct{ w io.Writer }

func (l *logger) printf(format string, args ...any) {
	_, _ = io.WriteString(l.w, "ditto-init: "+fmt.Sprintf(format, args...)+"\n")
}

// warnAll prints one line per error.
func (l *logger) warnAll(errs []error) {
	for _, err := range errs {
		l.printf("warning: %v", err)
	}
}

// uptime is the time since the kernel started, in seconds.
func uptime() float64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return float64(ts.Nano()) / 1e9
}

// activeConsole names the tty behind /dev/console: the last of the words in
// /sys/class/tty/console/active. "" means there is none (yet).
func activeConsole(sysfs string) string {
	b, err := os.ReadFile(filepath.Join(sysfs, "class/tty/console/active"))
	if err != nil {
		return ""
	}
	names := strings.Fields(string(b))
	if len(names) == 0 {
		return ""
	}
	return names[len(names)-1]
}

// isConsole tells whether fd is a terminal.
func isConsole(fd int) bool {
	_, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	return err == nil
}

// reopenConsole points the standard streams at /dev/console when the kernel
// had none to give at start, as with a console whose driver is a module.
func reopenConsole() error {
	f, err := os.OpenFile("/dev/console", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for fd := range 3 {
		if err := unix.Dup3(int(f.Fd()), fd, 0); err != nil {
			return err
		}
	}
	return nil
}

// openTTY opens the terminal a shell gets: the tty itself, because
// /dev/console cannot be a controlling terminal (no job control, no Ctrl-C).
func openTTY(name string, size winsize) (*os.File, error) {
	if name == "" {
		name = "console"
	}
	f, err := os.OpenFile(filepath.Join("/dev", filepath.Base(name)), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	fd := int(f.Fd())
	if ws, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ); err == nil && (ws.Col == 0 || ws.Row == 0) {
		_ = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Col: size.cols, Row: size.rows})
	}
	return f, nil
}

// saneTTY puts a terminal back into the mode a shell starts from; the last
// program may have left it raw.
func saneTTY(fd int) {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return
	}
	t.Iflag &^= unix.IGNBRK | unix.INLCR | unix.IGNCR | unix.IXOFF
	t.Iflag |= unix.BRKINT | unix.ICRNL | unix.IXON
	t.Oflag |= unix.OPOST | unix.ONLCR
	t.Cflag |= unix.CREAD
	t.Lflag |= unix.ISIG | unix.ICANON | unix.ECHO | unix.ECHOE | unix.ECHOK | unix.IEXTEN
	t.Lflag &^= unix.NOFLSH | unix.TOSTOP
	t.Cc[unix.VINTR], t.Cc[unix.VQUIT], t.Cc[unix.VERASE] = 3, 28, 127
	t.Cc[unix.VKILL], t.Cc[unix.VEOF], t.Cc[unix.VSUSP] = 21, 4, 26
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	_ = unix.IoctlSetTermios(fd, unix.TCSETS, t)
}
