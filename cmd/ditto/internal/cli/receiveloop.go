package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/vmproc"
)

// receiveLoop receives machines one after the other, each in a process of its
// own. Who comes between two of them waits in the listener's queue.
func (e *Env) receiveLoop(ctx context.Context, job receiveJob, l *net.TCPListener) error {
	socket, err := l.File()
	if err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	defer func() { _ = socket.Close() }() // each process has its own
	show := newReceiveDisplay(e.Stdout, e.Stderr, job.JSON)
	show.last = job.Once && !job.JSON
	show.listening(l.Addr().String())
	for {
		began := time.Now()
		err := e.receiveOne(ctx, job, show, socket)
		switch {
		case ctx.Err() != nil:
			return nil // it was the user's wish
		case job.Once || errors.Is(err, errReceiver):
			return err
		case err != nil && time.Since(began) < receivePause:
			// What fails at once fails at once again.
			select {
			case <-time.After(receivePause):
			case <-ctx.Done():
			}
		}
	}
}

// receivePause is the least time between two migrations of which the first
// failed.
const receivePause = 500 * time.Millisecond

// errReceiver: no machine can be received here at all.
var errReceiver = errors.New("the receiving process does not work")

// receiveStdio receives one machine over standard input and output.
func (e *Env) receiveStdio(ctx context.Context, job receiveJob) error {
	job.Stdio = true
	show := newReceiveDisplay(e.Stderr, e.Stderr, job.JSON)
	show.last = !job.JSON
	return e.receiveOne(ctx, job, show, e.Stdin, os.Stdout)
}

// receiveOne starts a process that receives a machine, and returns when it has
// become the machine or has ended.
func (e *Env) receiveOne(ctx context.Context, job receiveJob, show *receiveDisplay, sockets ...*os.File) error {
	c, err := spawn(childJob{Receive: &job, LogLevel: job.LogLevel}, sockets...)
	if err != nil {
		return fmt.Errorf("%w: %w", errReceiver, err)
	}
	defer c.close()
	// A signal would press the power button of a machine that has just arrived.
	stop := context.AfterFunc(ctx, func() { _, _ = c.life.Write([]byte{'c'}) })
	defer stop()
	return c.follow(show)
}

// follow shows what a receiving process tells, up to the end of the migration.
func (c *spawned) follow(show *receiveDisplay) error {
	ready := false
	events := json.NewDecoder(io.LimitReader(c.answers, maxReceiveBytes))
	for {
		var ev vmproc.ReceiveEvent
		if err := events.Decode(&ev); err != nil {
			err := fmt.Errorf("the receiving process ended without a word (%s)", c.wait())
			if !ready {
				return fmt.Errorf("%w: %w", errReceiver, err)
			}
			show.failed(vmproc.ReceiveEvent{Event: vmproc.ReceiveFailed, Error: err.Error(), Code: exit.Migration})
			return exit.New(exit.Migration, err)
		}
		switch ev.Event {
		case receiveReady:
			ready = true
		case vmproc.ReceiveArrived:
			show.arrived(ev)
			go c.wait() // when the machine ends
			return nil
		case vmproc.ReceiveFailed:
			if !ev.Canceled && !show.last {
				show.failed(ev)
			}
			c.wait()
			err := exit.Errorf(ev.Code, "%s", ev.Error)
			if !ready {
				return fmt.Errorf("%w: %w", errReceiver, err)
			}
			return err
		default:
			show.other(ev)
		}
	}
}

// receiveReady is the first word of a receiving process.
const receiveReady = "ready"

// maxReceiveBytes bounds what a receiving process tells: a few events a second
// for days.
const maxReceiveBytes = 1 << 30

// spawned is a process that this one started, with what it tells.
type spawned struct {
	process *os.Process
	// life is open as long as this process cares for the other.
	life    *os.File
	answers *os.File
}

// spawn starts a machine's process. It has the extra files after those of all.
func spawn(job childJob, extra ...*os.File) (_ *spawned, err error) {
	data, err := json.Marshal(job)
	if err != nil {
		return nil, fmt.Errorf("start the machine's process: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("start the machine's process: %w", err)
	}
	return startProcess(self, []string{"ditto", vmProcessArg}, data, os.Stderr, extra...)
}

// startProcess starts a process in a session of its own, with data on its
// descriptor 3 and its answers from 4: the terminal's signals, and its end, are
// not its own.
func startProcess(path string, args []string, data []byte, stderr *os.File, extra ...*os.File) (*spawned, error) {
	jobRead, jobWrite, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start the machine's process: %w", err)
	}
	answerRead, answerWrite, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start the machine's process: %w", err), jobRead.Close(), jobWrite.Close())
	}
	c := &spawned{life: jobWrite, answers: answerRead}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err == nil {
		c.process, err = os.StartProcess(path, args, &os.ProcAttr{
			Files: append([]*os.File{null, null, stderr, jobRead, answerWrite}, extra...),
			Sys:   &syscall.SysProcAttr{Setsid: true},
		})
		_ = null.Close()
	}
	_, _ = jobRead.Close(), answerWrite.Close()
	if err != nil {
		c.close()
		return nil, fmt.Errorf("start the machine's process: %w", err)
	}
	if _, err := jobWrite.Write(data); err != nil {
		_ = c.process.Kill()
		c.close()
		return nil, fmt.Errorf("start the machine's process: %w (%s)", err, c.wait())
	}
	return c, nil
}

// wait returns how the process ended.
func (c *spawned) wait() string {
	state, err := c.process.Wait()
	if err != nil {
		return err.Error()
	}
	return state.String()
}

// close lets go of the process.
func (c *spawned) close() { _, _ = c.life.Close(), c.answers.Close() }

// receiverArg is the only argument of a process that waits for machines in the
// background.
const receiverArg = "__receiver"

// receiveDetached leaves the waiting to a process in the background.
func (e *Env) receiveDetached(job receiveJob, l *net.TCPListener) error {
	r, err := e.Registry()
	if err != nil {
		return err
	}
	folder := r.StateDir(".receive")
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return fmt.Errorf("log: %w", err)
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(folder, port+".log"), os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	defer func() { _ = log.Close() }() // the process has its own
	socket, err := l.File()
	if err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	defer func() { _ = socket.Close() }() // likewise
	data, err := json.Marshal(job)
	if err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	c, err := startProcess(self, []string{"ditto", receiverArg}, data, log, socket)
	if err != nil {
		return err
	}
	defer c.close()
	if _, err := io.ReadFull(c.answers, make([]byte, 1)); err != nil {
		return fmt.Errorf("the receiver ended at once (%s): see %s", c.wait(), log.Name())
	}
	_, err = fmt.Fprintf(e.Stdout, "listening on %s, process %d, log %s\n", l.Addr(), c.process.Pid, log.Name())
	return err
}

// receiverMain is the process that waits in the background.
func (e *Env) receiverMain() int {
	for _, fd := range []int{jobFD, answerFD, socketFD} {
		unix.CloseOnExec(fd)
	}
	var job receiveJob
	jobs, answer, socket := os.NewFile(jobFD, "job"), os.NewFile(answerFD, "answer"), os.NewFile(socketFD, "socket")
	if err := json.NewDecoder(io.LimitReader(jobs, maxJobBytes)).Decode(&job); err != nil {
		fmt.Fprintf(os.Stderr, "ditto: the receiver got no job: %v: use ditto receive --detach\n", err)
		return exit.Usage
	}
	listener, err := net.FileListener(socket)
	_, _ = jobs.Close(), socket.Close()
	if err != nil {
		fmt.Fprintf(os.Stderr, "ditto: receive: %v\n", err)
		return exit.Net
	}
	_, _ = answer.Write([]byte{1}) // who waits for it may be gone
	_ = answer.Close()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	signal.Ignore(unix.SIGHUP)
	e.Stdout = os.Stderr
	if err := e.receiveLoop(ctx, job, listener.(*net.TCPListener)); err != nil {
		fmt.Fprintf(os.Stderr, "ditto: %s\n", oneLine(err))
		return vmproc.Classify(err)
	}
	return exit.OK
}
