package vmm

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"ditto.vm/vmm/kvm"
)

// errStopped is returned by commands to a vCPU whose thread has ended.
var errStopped = errors.New("vCPU has stopped")

// vcpu is one vCPU and the OS thread that owns it. Everything that touches the
// KVM descriptor runs on that thread: others send commands with [vcpu.do].
type vcpu struct {
	id   int
	kvm  *kvm.VCPU
	exit exitHandler

	tid      atomic.Int32
	commands chan command
	started  chan struct{} // closed when the thread knows its tid
	done     chan struct{} // closed when the thread has ended

	counts [kvm.MaxExitReason]atomic.Uint64

	// Owned by the thread.
	paused  bool
	stopped bool
}

// command is work for a vCPU's thread; err receives its result.
type command struct {
	run func() error
	err chan error
}

// exitHandler serves the exits of a vCPU.
type exitHandler interface {
	// handleExit serves one exit on the vCPU's thread. An error means that
	// the vCPU cannot go on.
	handleExit(c *vcpu) error
	// vcpuFailed hears the error that stopped a vCPU. The vCPU is paused.
	vcpuFailed(c *vcpu, err error)
}

func newVCPU(id int, k *kvm.VCPU, handler exitHandler) *vcpu {
	return &vcpu{
		id: id, kvm: k, exit: handler,
		commands: make(chan command, 8),
		started:  make(chan struct{}),
		done:     make(chan struct{}),
		paused:   true,
	}
}

// start begins the thread, paused.
func (c *vcpu) start() {
	go c.loop()
	<-c.started
}

// loop is the thread. The Go runtime destroys it afterwards, since it is locked
// when the goroutine ends.
func (c *vcpu) loop() {
	runtime.LockOSThread()
	defer close(c.done)
	c.tid.Store(int32(unix.Gettid()))
	close(c.started)
	for !c.stopped {
		if c.paused {
			c.serve(<-c.commands)
			continue
		}
		// Commands are drained only after EINTR: by then KVM has completed
		// the I/O of the last exit, and the registers are consistent.
		err := c.kvm.Run()
		switch {
		case errors.Is(err, kvm.ErrInterrupted):
			c.kvm.SetImmediateExit(false)
			c.drain()
			continue
		case err == nil:
			c.counts[min(c.kvm.ExitReason(), kvm.MaxExitReason-1)].Add(1)
			err = c.exit.handleExit(c)
		}
		if err != nil {
			c.paused = true
			c.exit.vcpuFailed(c, fmt.Errorf("vCPU %d: %w", c.id, err))
		}
	}
}

// drain serves what is queued.
func (c *vcpu) drain() {
	for {
		select {
		case cmd := <-c.commands:
			c.serve(cmd)
		default:
			return
		}
	}
}

func (c *vcpu) serve(cmd command) { cmd.err <- cmd.run() }

// do runs fn on the vCPU's thread, outside the guest, and returns its result.
// It fails with errStopped after the thread has ended.
func (c *vcpu) do(ctx context.Context, fn func() error) error {
	cmd := command{run: fn, err: make(chan error, 1)}
	select {
	case c.commands <- cmd:
	case <-c.done:
		return errStopped
	case <-ctx.Done():
		return ctx.Err()
	}
	c.kick()
	select {
	case err := <-cmd.err:
		return err
	case <-c.done:
		// The thread may have served the command last of all.
		select {
		case err := <-cmd.err:
			return err
		default:
			return errStopped
		}
	case <-ctx.Done():
		return ctx.Err()
	}
}

// kick makes the thread look at its commands. immediate_exit covers the time
// before KVM_RUN is entered; the signal wakes a vCPU that runs or is halted.
// The Go runtime owns SIGURG and ignores those it did not send.
func (c *vcpu) kick() {
	c.kvm.SetImmediateExit(true)
	_ = unix.Tgkill(unix.Getpid(), int(c.tid.Load()), unix.SIGURG)
}

// pause stops the vCPU outside the guest. Pausing twice is the same as once.
func (c *vcpu) pause(ctx context.Context) error {
	return c.do(ctx, func() error { c.paused = true; return nil })
}

// resume lets the vCPU enter the guest.
func (c *vcpu) resume(ctx context.Context) error {
	return c.do(ctx, func() error { c.paused = false; return nil })
}

// stop ends the thread and joins it.
func (c *vcpu) stop() {
	_ = c.do(context.Background(), func() error { c.stopped = true; return nil })
	<-c.done
}

// registers describes where the vCPU is, for a report. Preconditions: called
// on the vCPU's thread.
func (c *vcpu) registers() string {
	r, err := c.kvm.Regs()
	if err != nil {
		return err.Error()
	}
	s, err := c.kvm.Sregs()
	if err != nil {
		return err.Error()
	}
	var b strings.Builder
	fmt.Fprintf(&b, "rip=%#x rsp=%#x rflags=%#x ", r.RIP, r.RSP, r.RFLAGS)
	fmt.Fprintf(&b, "rax=%#x rbx=%#x rcx=%#x rdx=%#x rsi=%#x rdi=%#x rbp=%#x ", r.RAX, r.RBX, r.RCX, r.RDX, r.RSI, r.RDI, r.RBP)
	fmt.Fprintf(&b, "r8=%#x r9=%#x r10=%#x r11=%#x r12=%#x r13=%#x r14=%#x r15=%#x ", r.R8, r.R9, r.R10, r.R11, r.R12, r.R13, r.R14, r.R15)
	fmt.Fprintf(&b, "cr0=%#x cr2=%#x cr3=%#x cr4=%#x efer=%#x cs=%#x cpl=%d", s.CR0, s.CR2, s.CR3, s.CR4, s.EFER, s.CS.Selector, s.SS.DPL)
	return b.String()
}
