package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const searchPath = "/sbin:/bin:/bbin:/ubin:/usr/sbin:/usr/bin:/usr/local/bin"

// lookPath finds a program in searchPath.
func lookPath(name string) (string, error) {
	for _, dir := range filepath.SplitList(searchPath) {
		p := filepath.Join(dir, name)
		if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", &os.PathError{Op: "find", Path: name, Err: fs.ErrNotExist}
}

// findShell is the shell of the image: u-root's gosh or a POSIX shell.
func findShell(c config) (string, error) {
	if c.shell != "" {
		_, err := os.Stat(c.shell)
		return c.shell, err
	}
	for _, name := range []string{"gosh", "sh", "bash"} {
		if p, err := lookPath(name); err == nil {
			return p, nil
		}
	}
	return "", errors.New("the image has no shell (gosh or sh)")
}

// environment is what programs get. The kernel passes words it does not know
// as variables, so TERM=... on its command line wins over term.
func environment(term string) []string {
	if t := os.Getenv("TERM"); t != "" && t != "linux" || term == "" {
		term = t
	}
	return []string{"PATH=" + searchPath, "HOME=/root", "USER=root", "LOGNAME=root", "TERM=" + term}
}

// console runs programs on the terminal behind /dev/console, each in a session
// of its own with that terminal as its controlling one.
type console struct {
	reaper *reaper
	tty    string
	size   winsize
	term   string
	shell  string
}

func (c *console) start(argv []string) (<-chan syscall.WaitStatus, error) {
	tty, err := openTTY(c.tty, c.size)
	if err != nil {
		return nil, err
	}
	defer tty.Close()
	saneTTY(int(tty.Fd()))
	attr := &syscall.ProcAttr{
		Dir:   "/",
		Env:   environment(c.term),
		Files: []uintptr{tty.Fd(), tty.Fd(), tty.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true, Setctty: isConsole(int(tty.Fd())), Ctty: 0},
	}
	_, ended, err := c.reaper.start(argv[0], argv, attr)
	return ended, err
}

// runFile is the command an image may carry instead of ditto.run.
const runFile = "/etc/ditto/run"

// wantedCommand is the command to run, "" for an interactive shell.
func wantedCommand(c config) string {
	if c.run != "" {
		return c.run
	}
	b, _ := os.ReadFile(runFile)
	return strings.TrimSpace(string(b))
}

// runCommand runs a command by the shell and prints how it ended.
func (c *console) runCommand(log *logger, command string) (<-chan struct{}, error) {
	begin := time.Now()
	ended, err := c.start([]string{c.shell, "-c", command})
	if err != nil {
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		ws := <-ended
		if f, err := openTTY(c.tty, c.size); err == nil {
			saneTTY(int(f.Fd()))
			f.Close()
		}
		dur := time.Since(begin).Seconds()
		if ws.Signaled() {
			log.printf("exit status=%d signal=%d seconds=%.3f", exitCode(ws), int(ws.Signal()), dur)
			return
		}
		log.printf("exit status=%d seconds=%.3f", exitCode(ws), dur)
	}()
	return done, nil
}

// respawnPause keeps a shell that dies at once from filling the console.
const respawnPause = time.Second

// keepShell runs an interactive shell again and again until stop is closed.
func (c *console) keepShell(log *logger, stop <-chan struct{}) {
	for {
		begin := time.Now()
		ended, err := c.start([]string{c.shell})
		if err != nil {
			log.printf("shell: %v", err)
		} else {
			<-ended
		}
		pause := time.Duration(0)
		if err != nil || time.Since(begin) < respawnPause {
			pause = respawnPause
		}
		select {
		case <-stop:
			return
		case <-time.After(pause):
			unix.Sync()
		}
	}
}
