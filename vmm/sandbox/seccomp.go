package sandbox

import (
	"fmt"
	"os"
	"runtime"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"golang.org/x/sys/unix"
)

// allowed are the system calls that the process may make after Apply. Those
// that limits speaks of are allowed only with certain arguments.
func allowed(p Policy) []string {
	names := []string{
		// I/O on descriptors that are open.
		"read", "write", "readv", "writev", "pread64", "pwrite64", "preadv", "pwritev", "preadv2", "pwritev2",
		"close", "dup", "dup3", "fcntl", "lseek", "fstat", "newfstatat", "statx", "ftruncate", "fallocate",
		"fsync", "fdatasync", "sync_file_range", "fadvise64", "copy_file_range", "ioctl", "flock",
		// Waiting.
		"epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2", "poll", "ppoll",
		"eventfd2", "pipe2", "timerfd_create", "timerfd_settime", "timerfd_gettime",
		// Memory.
		"mmap", "munmap", "mremap", "mprotect", "madvise", "mincore", "msync", "mlock", "mlock2", "munlock", "brk",
		"process_vm_readv", "process_vm_writev",
		// Threads, signals and time: the Go runtime, kicking vCPUs, and reaping
		// the network process.
		"clone", "futex", "set_robust_list", "rseq", "gettid", "getpid", "tgkill", "sched_yield",
		"sched_getaffinity", "sched_setaffinity", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn",
		"rt_sigtimedwait", "sigaltstack", "restart_syscall", "nanosleep", "clock_nanosleep", "clock_gettime",
		"clock_getres", "gettimeofday", "getrandom", "getrusage", "prctl", "exit", "exit_group", "wait4", "waitid",
		"getuid", "geteuid", "getgid", "getegid", "uname", "sysinfo", "getcpu",
		// The control and console sockets, which listen already, and the
		// network peers, which are connected already.
		"accept4", "getsockname", "getpeername", "getsockopt", "setsockopt",
		"sendto", "recvfrom", "sendmsg", "recvmsg", "sendmmsg", "recvmmsg", "shutdown",
		// Paths, as far as landlock lets them: the run directory goes at the
		// end.
		"openat", "getdents64", "unlinkat", "readlinkat", "faccessat2",
	}
	if p.TakeOver {
		names = append(names, "renameat")
	}
	if p.IOUring {
		names = append(names, "io_uring_enter")
	}
	return names
}

// limit denies a system call when all conditions of one of its alternatives
// hold.
type limit struct {
	name string
	deny []seccomp.ArgumentConditions
}

func condition(arg uint32, op seccomp.Operation, value uint64) seccomp.Condition {
	return seccomp.Condition{Argument: arg, Operation: op, Value: value}
}

func deny(name string, conditions ...seccomp.Condition) limit {
	return limit{name, []seccomp.ArgumentConditions{conditions}}
}

// limits are the conditions on allowed system calls.
func limits(pid int) []limit {
	self := condition(0, seccomp.NotEqual, uint64(pid))
	exec := condition(2, seccomp.BitsSet, unix.PROT_EXEC)
	return []limit{
		// New threads, no new processes.
		deny("clone", condition(0, seccomp.BitsNotSet, unix.CLONE_THREAD)),
		// Nothing is opened for writing, even where landlock is missing.
		deny("openat", condition(2, seccomp.BitsSet, unix.O_WRONLY|unix.O_RDWR|unix.O_CREAT|unix.O_TRUNC)),
		// No code beyond the program's own.
		deny("mmap", exec),
		deny("mprotect", exec),
		// No other process.
		deny("tgkill", self),
		deny("process_vm_readv", self),
		deny("process_vm_writev", self),
		deny("prctl", condition(0, seccomp.NotEqual, unix.PR_SET_NAME), condition(0, seccomp.NotEqual, unix.PR_SET_VMA)),
		{"ioctl", deniedIoctls()},
	}
}

// The ioctls of KVM have type 0xAE, those of userfaultfd 0xAA: as bits 8 to 15
// of the request, 1010_1x10.
const (
	ioctlTypeOnes  = 0xaa00
	ioctlTypeZeros = 0x5100
)

// allowedIoctls are the requests outside KVM and userfaultfd. TIOCSTI is not
// among them: it would type into the terminal that ditto was started from.
func allowedIoctls() []uint64 {
	return []uint64{
		unix.TCGETS, unix.TCSETS, unix.TCSETSW, unix.TCSETSF, unix.TIOCGWINSZ, // the user's terminal
		unix.TIOCINQ,
		unix.BLKDISCARD, unix.BLKZEROOUT, unix.BLKGETSIZE64, unix.BLKFLSBUF, // disks
		unix.TUNSETOFFLOAD, unix.TUNSETVNETHDRSZ, unix.TUNSETQUEUE, // features that the guest's driver negotiates
		0xc0606610, // PAGEMAP_SCAN
	}
}

// deniedIoctls is the negation of "KVM, userfaultfd or allowedIoctls": a request
// is denied when any bit of its type is wrong and it equals none of the list.
func deniedIoctls() []seccomp.ArgumentConditions {
	var unlisted seccomp.ArgumentConditions
	for _, request := range allowedIoctls() {
		unlisted = append(unlisted, condition(1, seccomp.NotEqual, request))
	}
	alternative := func(c seccomp.Condition) seccomp.ArgumentConditions {
		return append(seccomp.ArgumentConditions{c}, unlisted...)
	}
	var out []seccomp.ArgumentConditions
	for bit := uint64(1); bit < 1<<16; bit <<= 1 {
		if ioctlTypeOnes&bit != 0 {
			out = append(out, alternative(condition(1, seccomp.BitsNotSet, bit)))
		}
	}
	return append(out, alternative(condition(1, seccomp.BitsSet, ioctlTypeZeros)))
}

// policies returns the filters in the order to load them: the list that forbids
// loading more comes last.
func policies(p Policy, pid int) []seccomp.Policy {
	var out []seccomp.Policy
	for _, l := range limits(pid) {
		group := seccomp.SyscallGroup{Action: seccomp.ActionErrno}
		for _, conditions := range l.deny {
			group.NamesWithCondtions = append(group.NamesWithCondtions, seccomp.NameWithConditions{Name: l.name, Conditions: conditions})
		}
		out = append(out, seccomp.Policy{DefaultAction: seccomp.ActionAllow, Syscalls: []seccomp.SyscallGroup{group}})
	}
	return append(out, seccomp.Policy{
		DefaultAction: seccomp.ActionErrno,
		Syscalls: []seccomp.SyscallGroup{
			{Names: allowed(p), Action: seccomp.ActionAllow},
			{Names: []string{"execve", "execveat"}, Action: seccomp.ActionKillProcess},
			{Names: []string{"clone3"}, Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS)},
		},
	})
}

// applySeccomp loads the filters on all threads.
func applySeccomp(p Policy) error {
	// no_new_privs is set on the thread that loads the filter, and spread to
	// the others by TSYNC.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for i, policy := range policies(p, os.Getpid()) {
		// Once is enough, and the filters forbid setting it again.
		filter := seccomp.Filter{NoNewPrivs: i == 0, Flag: seccomp.FilterFlagTSync, Policy: policy}
		if err := seccomp.LoadFilter(filter); err != nil {
			return fmt.Errorf("seccomp: %w", err)
		}
	}
	return nil
}
