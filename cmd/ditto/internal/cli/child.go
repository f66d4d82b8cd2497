package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/vmproc"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/sandbox"
)

// vmProcessArg is the only argument of a process that runs a machine in the
// background. It gets its job from descriptor 3 and answers on 4.
const vmProcessArg = "__machine"

// The descriptors of a machine's process.
const (
	jobFD    = 3
	answerFD = 4
)

// maxJobBytes bounds what a child reads.
const maxJobBytes = 1 << 20

// childJob is what a machine's process is to do.
type childJob struct {
	Config   config.Config `json:"config"`
	Command  bool          `json:"command"` // the guest runs a command
	LogLevel slog.Level    `json:"log_level"`
	// Restore makes the machine of a snapshot.
	Restore *vmproc.Restore `json:"restore,omitempty"`
	// Receive makes the machine that another host sends.
	Receive *receiveJob `json:"receive,omitempty"`
}

// builder returns what makes the machine of a job.
func (e *Env) builder(job childJob) vmproc.Builder {
	if job.Restore != nil {
		return e.Restore(*job.Restore)
	}
	return e.Build
}

// childAnswer is the child's only message: the name when the guest runs, or why
// it does not.
type childAnswer struct {
	Name  string `json:"name,omitempty"`
	Error string `json:"error,omitempty"`
	Code  int    `json:"code,omitempty"`
}

// child is a machine's process, seen by the one that started it.
type child struct {
	name    string
	process *os.Process
}

// wait returns when the process has ended.
func (c *child) wait() { _, _ = c.process.Wait() }

// startChild starts a machine's process and returns when its guest runs. If it
// does not come to that, the process has ended and nothing is left.
func (e *Env) startChild(ctx context.Context, job childJob) (*child, error) {
	started, err := spawn(job)
	if err != nil {
		return nil, err
	}
	defer started.close()
	process := started.process
	c := &child{process: process}
	// An interrupted start must not leave a machine behind.
	stop := context.AfterFunc(ctx, func() { _ = process.Kill() })
	defer stop()

	var answer childAnswer
	if err := json.NewDecoder(io.LimitReader(started.answers, maxJobBytes)).Decode(&answer); err != nil || answer.Name == "" {
		c.wait()
		switch {
		case ctx.Err() != nil:
			// It was killed and could not clean up; looking for machines does.
			if r, err := e.Registry(); err == nil {
				_, _ = r.List()
			}
			return nil, ctx.Err()
		case answer.Error != "":
			return nil, exit.Errorf(answer.Code, "%s", answer.Error)
		}
		return nil, errors.New("the machine's process ended before the guest ran")
	}
	c.name = answer.Name
	return c, nil
}

// rest is what is left of a file of which a part was read ahead.
type rest struct {
	io.Reader
	io.Closer
}

// childMain is a machine's process.
func (e *Env) childMain() int {
	answer := os.NewFile(answerFD, "answer")
	fail := func(err error) int {
		code := vmproc.Classify(err)
		_ = json.NewEncoder(answer).Encode(childAnswer{Error: oneLine(err), Code: code})
		return code
	}
	unix.CloseOnExec(answerFD)
	unix.CloseOnExec(jobFD)
	var job childJob
	jobs := os.NewFile(jobFD, "job")
	words := json.NewDecoder(io.LimitReader(jobs, maxJobBytes))
	if err := words.Decode(&job); err != nil {
		return fail(fmt.Errorf("the machine's process got no job: %w: use ditto run", err))
	}
	if job.Receive != nil {
		// What was said behind the job may have been read with it.
		return e.receiveMain(*job.Receive, rest{io.MultiReader(words.Buffered(), jobs), jobs}, answer)
	}
	_ = jobs.Close()
	r, err := e.Registry()
	if err != nil {
		return fail(err)
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, unix.SIGTERM)
	signal.Ignore(unix.SIGHUP, unix.SIGINT)
	running := false
	code, err := vmproc.Run(context.Background(), vmproc.Options{
		Config: job.Config, Command: job.Command, Registry: r, Build: e.builder(job), Version: e.Version.String(),
		Log:     func(stateDir string) (*slog.Logger, error) { return openOwnLog(stateDir, job.LogLevel) },
		Sandbox: sandbox.Apply,
		Signals: signals,
		Ready: func(name string) {
			running = true
			if json.NewEncoder(answer).Encode(childAnswer{Name: name}) != nil {
				// Nobody waits for this machine any more.
				signals <- unix.SIGTERM
				signals <- unix.SIGTERM
			}
			_ = answer.Close()
		},
	})
	if err != nil && !running {
		return fail(err)
	}
	return code
}

// ownLogPath is where a background process logs.
func ownLogPath(stateDir string) string { return filepath.Join(stateDir, "ditto.log") }

// openOwnLog starts the log of a background process and makes it the standard
// error, so that a crash of the Go runtime is in it too.
func openOwnLog(stateDir string, level slog.Level) (*slog.Logger, error) {
	return ownLog(stateDir, level, os.O_TRUNC)
}

// continueOwnLog is openOwnLog for a machine that another process had.
func continueOwnLog(stateDir string, level slog.Level) (*slog.Logger, error) {
	return ownLog(stateDir, level, 0)
}

func ownLog(stateDir string, level slog.Level, flags int) (*slog.Logger, error) {
	f, err := os.OpenFile(ownLogPath(stateDir), os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW|flags, 0o600)
	if err != nil {
		return nil, fmt.Errorf("log: %w", err)
	}
	defer f.Close()
	if err := unix.Dup3(int(f.Fd()), 2, 0); err != nil {
		return nil, fmt.Errorf("log: %w", err)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})), nil
}
