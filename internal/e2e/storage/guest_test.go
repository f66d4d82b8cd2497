package storage

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// TestMain is the guest's first process in a guest, and runs tests elsewhere.
func TestMain(m *testing.M) {
	if os.Getpid() == 1 {
		guestMain()
	}
	goleak.VerifyTestMain(m)
}

// jobs are what a guest can be told to do, by the name on its command line.
// What they print is their result; an error ends the guest with a line.
var jobs = map[string]func(guestArgs) error{
	"powercut": writeRecords,
	"content":  writeContent,
	"erase":    eraseAll,
	"hold":     holdDisk,
}

// guestArgs are the words job.NAME=VALUE of the kernel's command line.
type guestArgs map[string]string

func (a guestArgs) number(name string) uint64 {
	n, err := strconv.ParseUint(a[name], 10, 64)
	if err != nil {
		panic(err) // the test's own mistake; the kernel reports it
	}
	return n
}

// jobPrefix marks the words that are for the job.
const jobPrefix = "job."

// jobDone and jobFailed begin the last line of a job.
const (
	jobDone   = "JOB-DONE"
	jobFailed = "JOB-FAILED"
)

// guestMain sets a guest up, runs its job and switches it off.
func guestMain() {
	// Nothing kills the first process; the runtime must not try.
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	err := guestSetup()
	if err == nil {
		err = guestJob()
	}
	if err != nil {
		fmt.Printf("\n%s %v\n", jobFailed, err)
	} else {
		fmt.Printf("\n%s\n", jobDone)
	}
	// The console is written behind our back: wait for it.
	if f, err := os.OpenFile("/dev/console", os.O_WRONLY, 0); err == nil {
		const drain = 1
		_ = unix.IoctlSetInt(int(f.Fd()), unix.TCSBRK, drain)
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

// guestSetup mounts what a job needs and loads the drivers.
func guestSetup() error {
	for _, m := range []struct{ kind, dir string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"},
	} {
		if err := errors.Join(os.MkdirAll(m.dir, 0o755), unix.Mount(m.kind, m.dir, m.kind, 0, "")); err != nil {
			return fmt.Errorf("mount %s: %w", m.kind, err)
		}
	}
	names, err := filepath.Glob("/modules/*.ko") // sorted
	if err != nil {
		return err
	}
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		_ = f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load %s: %w", name, err)
		}
	}
	return nil
}

func guestJob() error {
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	args := guestArgs{}
	for word := range strings.FieldsSeq(string(text)) {
		if rest, ok := strings.CutPrefix(word, jobPrefix); ok {
			name, value, _ := strings.Cut(rest, "=")
			args[name] = value
		}
	}
	job, ok := jobs[args["name"]]
	if !ok {
		return fmt.Errorf("no job is called %q", args["name"])
	}
	return job(args)
}

// mountExt4 mounts a disk on a folder of its own.
func mountExt4(dev, options string) (string, error) {
	dir := "/mnt/" + filepath.Base(dev)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	if err := unix.Mount(dev, dir, "ext4", 0, options); err != nil {
		return "", fmt.Errorf("mount %s: %w", dev, err)
	}
	return dir, nil
}

// readLine waits for a line typed on the console.
func readLine() (string, error) {
	line, err := bufio.NewReader(os.Stdin).ReadString('\n')
	return strings.TrimSpace(line), err
}
