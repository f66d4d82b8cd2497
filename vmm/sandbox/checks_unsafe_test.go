package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ditto.vm/memory"
	"ditto.vm/vmm/kvm"
	"ditto.vm/vmm/lend"
)

// check is something that a restricted process tries.
type check struct {
	allowed  bool // it must work
	kills    bool // the attempt must kill the process
	landlock bool // only landlock forbids it
	kvm      bool // it needs /dev/kvm
	// prepare runs before the sandbox is applied and returns the attempt.
	prepare func(dir string) (func() error, error)
}

// after is a check that needs nothing before the sandbox.
func after(f func(dir string) error) func(string) (func() error, error) {
	return func(dir string) (func() error, error) { return func() error { return f(dir) }, nil }
}

func raw(nr uintptr, args ...uintptr) error {
	var a [6]uintptr
	copy(a[:], args)
	if _, _, errno := syscall.Syscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
		return errno
	}
	return nil
}

func allChecks() map[string]check {
	all := forbiddenChecks()
	for name, c := range allowedChecks() {
		c.allowed = true
		all[name] = c
	}
	return all
}

func forbiddenChecks() map[string]check {
	return map[string]check{
		"open a file": {landlock: true, prepare: after(func(dir string) error {
			_, err := os.ReadFile(filepath.Join(dir, "secret"))
			return err
		})},
		"open /dev/kvm": {landlock: true, prepare: after(func(string) error {
			_, err := os.Open("/dev/kvm")
			return err
		})},
		"write to a readable file": {prepare: after(func(dir string) error {
			_, err := os.OpenFile(filepath.Join(dir, "readable/file"), os.O_WRONLY, 0)
			return err
		})},
		"create a file in the run folder": {prepare: after(func(dir string) error {
			_, err := os.Create(filepath.Join(dir, "run/vm/new"))
			return err
		})},
		"remove another machine's file": {landlock: true, prepare: after(func(dir string) error {
			return os.Remove(filepath.Join(dir, "run/other/lock"))
		})},
		"execute a program": {prepare: after(func(string) error { return exec.Command("/bin/true").Run() })},
		"execve": {kills: true, prepare: func(string) (func() error, error) {
			// Without the sandbox the program must fail to start, not replace
			// the check.
			path, err := unix.BytePtrFromString("/dev/null")
			return func() error {
				errno := raw(unix.SYS_EXECVE, uintptr(unsafe.Pointer(path)), 0, 0)
				if errors.Is(errno, unix.EACCES) {
					return nil
				}
				return errno
			}, err
		}},
		"fork": {prepare: after(func(string) error {
			pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
			if errno != 0 {
				return errno
			}
			if pid == 0 {
				syscall.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
			}
			_, err := unix.Wait4(int(pid), nil, 0, nil)
			return err
		})},
		"internet socket": {prepare: after(func(string) error {
			return raw(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM, 0)
		})},
		"unix socket": {prepare: after(func(string) error {
			return raw(unix.SYS_SOCKET, unix.AF_UNIX, unix.SOCK_STREAM, 0)
		})},
		"connect": {prepare: func(string) (func() error, error) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return nil, err
			}
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
			port := l.Addr().(*net.TCPAddr).Port
			return func() error {
				return unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}})
			}, err
		}},
		"ptrace": {prepare: after(func(string) error {
			return raw(unix.SYS_PTRACE, unix.PTRACE_TRACEME)
		})},
		"kill": {prepare: after(func(string) error { return unix.Kill(os.Getppid(), 0) })},
		"signal a thread of another process": {prepare: after(func(string) error {
			return unix.Tgkill(os.Getppid(), os.Getppid(), 0)
		})},
		"read another process's memory": {prepare: func(string) (func() error, error) {
			cmd := exec.Command("sleep", "60")
			if err := cmd.Start(); err != nil {
				return nil, err
			}
			return func() error {
				defer func() { _ = cmd.Process.Kill() }()
				// Address 1 is mapped nowhere: EFAULT means it was allowed.
				local := unix.Iovec{Base: new(byte), Len: 1}
				_, err := unix.ProcessVMReadv(cmd.Process.Pid, []unix.Iovec{local}, []unix.RemoteIovec{{Base: 1, Len: 1}}, 0)
				if errors.Is(err, unix.EFAULT) {
					return nil
				}
				return err
			}, nil
		}},
		"map executable memory": {prepare: after(func(string) error {
			_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
			return err
		})},
		// The protection equals the number of an allowed system call (5,
		// fstat): a filter that compares one with the other lets it through.
		"make memory executable": {prepare: after(func(string) error {
			mem, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANON)
			if err != nil {
				return err
			}
			return unix.Mprotect(mem, unix.PROT_READ|unix.PROT_EXEC)
		})},
		"type into the terminal": {prepare: func(string) (func() error, error) {
			master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY, 0)
			if err != nil {
				return nil, err
			}
			char := byte('x')
			return func() error {
				return raw(unix.SYS_IOCTL, uintptr(master), unix.TIOCSTI, uintptr(unsafe.Pointer(&char)))
			}, nil
		}},
		"the same with high bits": {prepare: func(string) (func() error, error) {
			master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY, 0)
			if err != nil {
				return nil, err
			}
			char := byte('x')
			return func() error {
				return raw(unix.SYS_IOCTL, uintptr(master), 1<<32|unix.TIOCSTI, uintptr(unsafe.Pointer(&char)))
			}, nil
		}},
		"gain rights through prctl": {prepare: after(func(string) error {
			return unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0)
		})},
		"change the limit on core files": {prepare: after(func(string) error {
			return unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
		})},
		"use a capability": {prepare: func(dir string) (func() error, error) {
			// The run folder lets files be removed, so only the capability
			// to override the owner is missing.
			file := filepath.Join(dir, "run/vm")
			if err := os.Chown(file, 12345, 12345); err != nil {
				return nil, err
			}
			return func() error { return os.Remove(filepath.Join(file, "lock")) }, nil
		}},
		"load another filter": {prepare: after(func(string) error {
			err := raw(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_STRICT, 1, 0)
			if errors.Is(err, unix.EINVAL) {
				return nil
			}
			return err
		})},
		"clone3": {prepare: after(func(string) error {
			err := raw(unix.SYS_CLONE3, 0, 0)
			if errors.Is(err, unix.EINVAL) {
				return nil
			}
			return err
		})},
		"mount": {prepare: after(func(dir string) error {
			target := filepath.Join(dir, "run/other")
			if err := unix.Mount("none", target, "tmpfs", 0, ""); err != nil {
				return err
			}
			return unix.Unmount(target, 0)
		})},
		"io_uring": {prepare: after(func(string) error {
			err := raw(unix.SYS_IO_URING_ENTER, ^uintptr(0), 0, 0, 0, 0, 0)
			if errors.Is(err, unix.EBADF) {
				return nil
			}
			return err
		})},
	}
}

func allowedChecks() map[string]check {
	return map[string]check{
		"getpid": {prepare: after(func(string) error { _ = os.Getpid(); return nil })},
		"runtime": {prepare: after(func(string) error {
			// New threads, garbage, timers.
			var wg sync.WaitGroup
			for range 16 {
				wg.Go(func() {
					runtime.LockOSThread()
					for range 50 {
						_ = make([]byte, 1<<20)
					}
					timer := time.NewTimer(time.Millisecond)
					<-timer.C
				})
			}
			wg.Wait()
			runtime.GC()
			return nil
		})},
		"serve a socket": {prepare: func(dir string) (func() error, error) {
			path := filepath.Join(dir, "run/vm/api.sock")
			l, err := net.Listen("unix", path)
			if err != nil {
				return nil, err
			}
			c, err := net.Dial("unix", path)
			return func() error {
				served, err := l.Accept()
				if err != nil {
					return err
				}
				if _, err := c.Write([]byte("ping")); err != nil {
					return err
				}
				_, err = io.ReadFull(served, make([]byte, 4))
				return err
			}, err
		}},
		"disk": {prepare: func(dir string) (func() error, error) {
			f, err := os.OpenFile(filepath.Join(dir, "disk"), os.O_RDWR, 0)
			return func() error {
				fd := int(f.Fd())
				bufs := [][]byte{make([]byte, 512), make([]byte, 512)}
				if _, err := unix.Preadv(fd, bufs, 0); err != nil {
					return err
				}
				if _, err := unix.Pwritev(fd, bufs, 4096); err != nil {
					return err
				}
				if err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096); err != nil {
					return err
				}
				return unix.Fdatasync(fd)
			}, err
		}},
		"guest memory": {prepare: after(func(string) error {
			mem, err := unix.Mmap(-1, 0, 4<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
			if err != nil {
				return err
			}
			mem[0] = 1
			if err := unix.Madvise(mem, unix.MADV_DONTNEED); err != nil {
				return err
			}
			local := unix.Iovec{Base: &mem[0], Len: 1}
			_, err = unix.ProcessVMReadv(os.Getpid(), []unix.Iovec{local}, []unix.RemoteIovec{{Base: uintptr(unsafe.Pointer(&mem[1])), Len: 1}}, 0)
			return err
		})},
		"track writes by wp-async":       {prepare: trackWrites(memory.TrackerWPAsync)},
		"track writes by kvm-log":        {kvm: true, prepare: trackWrites(memory.TrackerKVMLog)},
		"make frames large":              {prepare: collapseFrame},
		"compare memory with a mapping":  {prepare: readMapped},
		"write a file that was lent":     {prepare: writeLent},
		"give memory back":               {prepare: discardPages},
		"restore memory lazily":          {prepare: restoredMemory},
		"read a disk while it is in use": {prepare: readDisk},
		"kick a thread": {prepare: after(func(string) error {
			runtime.LockOSThread()
			return unix.Tgkill(os.Getpid(), unix.Gettid(), unix.SIGURG)
		})},
		"run a guest": {kvm: true, prepare: func(string) (func() error, error) {
			system, err := kvm.Open()
			return func() error {
				// Whether Linux could run does not matter, only that the
				// probe's guest ran.
				_, err := system.ProbeLinux()
				return err
			}, err
		}},
		"read a readable file": {prepare: after(func(dir string) error {
			_, err := os.ReadFile(filepath.Join(dir, "readable/file"))
			return err
		})},
		"remove the run folder": {prepare: after(func(dir string) error {
			run := filepath.Join(dir, "run/vm")
			entries, err := os.ReadDir(run)
			if err != nil {
				return err
			}
			for _, e := range entries {
				if err := os.Remove(filepath.Join(run, e.Name())); err != nil {
					return err
				}
			}
			return os.Remove(run)
		})},
		"log with the local time": {prepare: after(func(string) error {
			_, err := fmt.Fprintln(io.Discard, time.Now().Local())
			return err
		})},
		"ioctl on a terminal": {prepare: func(string) (func() error, error) {
			master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY, 0)
			return func() error {
				termios, err := unix.IoctlGetTermios(master, unix.TCGETS)
				if err != nil {
					return err
				}
				return unix.IoctlSetTermios(master, unix.TCSETS, termios)
			}, err
		}},
	}
}

// writeLent takes a descriptor from a client, as a save does.
func writeLent(dir string) (func() error, error) {
	l, err := lend.Listen(filepath.Join(dir, "run/vm/ops.sock"))
	if err != nil {
		return nil, err
	}
	file, err := os.OpenFile(filepath.Join(dir, "disk"), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	running, restricted := make(chan struct{}), make(chan struct{})
	server := lend.NewServer(map[string]lend.Operation{"write": func(ctx context.Context, s *lend.Session, _ json.RawMessage) (any, error) {
		close(running)
		<-restricted
		lent, err := s.Ask(ctx, "file", nil, nil, 1)
		if err != nil {
			return nil, err
		}
		defer lent[0].Close()
		if err := lend.CheckRegular(lent[0], unix.O_RDWR); err != nil {
			return nil, err
		}
		_, err = lent[0].WriteAt([]byte("written"), 0)
		return nil, errors.Join(err, lent[0].Truncate(7), lent[0].Sync())
	}}, nil, slog.New(slog.DiscardHandler))
	server.Serve(l)
	done := make(chan error, 1)
	go func() {
		client := lend.Client{Answer: func(context.Context, string, json.RawMessage) (any, []*os.File, error) {
			return nil, []*os.File{file}, nil
		}}
		done <- client.Call(context.Background(), filepath.Join(dir, "run/vm/ops.sock"), "write", nil, nil)
	}()
	<-running
	return func() error {
		close(restricted)
		return errors.Join(<-done, server.Close())
	}, nil
}
