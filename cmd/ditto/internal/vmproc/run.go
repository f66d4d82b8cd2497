package vmproc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"sync"
	"time"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/hub"
	"ditto.vm/cmd/ditto/internal/terminal"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/lend"
	"ditto.vm/vmm/lend/remotemigrate"
	"ditto.vm/vmm/lend/remotesave"
	"ditto.vm/vmm/registry"
	"ditto.vm/vmm/sandbox"
)

// Options say how to run a machine.
type Options struct {
	Config config.Config
	// Command says that the guest runs a command whose status it prints: that
	// status is the exit code.
	Command  bool
	Registry *registry.Registry
	Build    Builder
	Version  string
	// Log returns the logger, given the machine's state directory.
	Log func(stateDir string) (*slog.Logger, error)
	// Output gets the console beside the log and the sockets, nil for nobody.
	Output Output
	// Input is typed on the console, nil for nothing.
	Input *os.File
	// Ready is told the name when the guest runs. It may be nil.
	Ready func(name string)
	// Signals stop the machine: the first presses the power button, the second
	// kills.
	Signals <-chan os.Signal
	// Sandbox drops the process's rights, unless the configuration says not to.
	Sandbox func(sandbox.Policy) (sandbox.Report, error)
}

// Output is where the console goes besides the log. A *terminal.CommandOutput
// also tells the status of a command that the guest ran.
type Output interface{ Write(p []byte) (int, error) }

// signalGrace is what a guest gets to power itself off after a signal.
const signalGrace = 10 * time.Second

// process is the state of Run.
type process struct {
	Options
	lease   *registry.Lease
	log     *slog.Logger
	hub     *hub.Hub
	status  *terminal.CommandOutput // knows how the command ended; nil if none runs
	machine Machine
	sockets sockets
	record  *os.File       // how it ended
	closers []func() error // in the order they were opened
	// handed is what an upgraded machine had in its old process; nil for others.
	handed *remotemigrate.Belongings
	// takenOver: another process of this host has the machine and its name.
	takenOver bool
}

// sockets are where a machine listens. Who serves them closes them.
type sockets struct {
	api, console net.Listener
	ops          *net.UnixListener
}

func (s *sockets) close() error {
	var errs []error
	for _, l := range []net.Listener{s.api, s.console} {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	if s.ops != nil {
		errs = append(errs, s.ops.Close())
	}
	*s = sockets{}
	return errors.Join(errs...)
}

func newProcess(o Options) *process { return &process{Options: o, hub: hub.New()} }

// Run runs a machine to its end and returns the exit code of the process. An
// error is what kept the machine from running, or what broke it.
func Run(ctx context.Context, o Options) (code int, err error) {
	p := newProcess(o)
	defer func() {
		if e := p.close(); err == nil && e != nil {
			p.log.Warn("not all could be cleaned up", "err", e)
		}
	}()
	if err := p.open(ctx); err != nil {
		return 0, err
	}
	return p.run(ctx)
}

// onClose registers what undoes an opening.
func (p *process) onClose(f func() error) { p.closers = append(p.closers, f) }

// close undoes everything in the opposite order.
func (p *process) close() error {
	var errs []error
	for i := len(p.closers) - 1; i >= 0; i-- {
		errs = append(errs, p.closers[i]())
	}
	p.closers = nil
	return errors.Join(errs...)
}

// open takes the name and makes what belongs to it.
func (p *process) open(ctx context.Context) error {
	surroundings, err := p.openPlace()
	if err != nil {
		return err
	}
	if p.machine, err = p.Build(ctx, p.Config, surroundings); err != nil {
		return err
	}
	p.onClose(p.machine.Close)
	return nil
}

// openPlace takes the name and makes logs.
func (p *process) openPlace() (s Surroundings, err error) {
	if p.handed != nil {
		lock := p.handed.Lock
		p.handed.Lock = nil
		p.lease, err = p.Registry.Adopt(p.Config.Name, lock)
	} else {
		p.lease, err = p.Registry.Acquire(p.Config.Name)
	}
	if err != nil {
		return s, err
	}
	p.onClose(p.release)
	p.Config.Name = p.lease.Name
	if p.log, err = p.Log(p.lease.StateDir); err != nil {
		return s, err
	}
	openLog := p.lease.OpenLog
	if p.handed != nil {
		openLog = p.lease.ContinueLog
	}
	logFile, err := openLog(registry.DefaultLogCap)
	if err != nil {
		return s, err
	}
	p.onClose(logFile.Close)
	p.onClose(func() error { p.hub.Close(); return nil })
	p.hub.AddLog(logFile)
	p.addOutput()
	return Surroundings{
		Log: p.log, Console: p.hub, Version: p.Version,
		LogPath: p.lease.LogPath(), Sandboxed: bool(p.Config.Sandbox), Handed: p.handed,
	}, nil
}

// release gives the name back, unless another process has it now.
func (p *process) release() error {
	if p.takenOver {
		return p.lease.Yield()
	}
	return p.lease.Release()
}

// addOutput adds the output, and learns the status of a command from the
// console if the guest runs one.
func (p *process) addOutput() {
	command, isFilter := p.Output.(*terminal.CommandOutput)
	switch {
	case !p.Options.Command:
	case isFilter:
		p.status = command
	default:
		p.status = terminal.NewCommandOutput(nil, false)
		p.hub.AddLog(p.status)
	}
	if p.Output != nil {
		p.hub.AddOutput(p.Output)
	}
}

// run serves the machine, restricts the process, starts the guest and waits.
func (p *process) run(ctx context.Context) (code int, err error) {
	if p.record, err = p.lease.OpenExit(); err != nil {
		return 0, err
	}
	p.onClose(p.record.Close)
	if err := p.listen(); err != nil {
		return 0, err
	}
	if err := p.publish(p.machine.Disks(), false); err != nil {
		return 0, err
	}
	if err := p.restrict(); err != nil {
		return 0, err
	}
	return p.live(ctx, p.machine.Start)
}

// listen makes the sockets.
func (p *process) listen() (err error) {
	p.onClose(p.sockets.close)
	if p.sockets.api, err = api.Listen(p.lease.APISocket()); err != nil {
		return err
	}
	if p.sockets.console, err = hub.Listen(p.lease.ConsoleSocket()); err != nil {
		return err
	}
	p.sockets.ops, err = lend.Listen(p.lease.OpsSocket())
	return err
}

// live lets the guest run to its end, and writes down how that was.
func (p *process) live(ctx context.Context, start func(context.Context) error) (int, error) {
	ended, err := p.serve(ctx, start)
	code, err := p.outcome(ended, err)
	result := registry.ExitRecord{Time: time.Now().UTC(), Reason: ended.Reason, Code: code, Where: ended.Where}
	if err != nil {
		result.Error = err.Error()
	}
	if p.takenOver = ended.TakenOver; p.takenOver {
		return code, err // it has not ended
	}
	if e := registry.WriteExit(p.record, result); e != nil {
		p.log.Warn("exit record", "err", e)
	}
	return code, err
}

// publish tells others of the machine.
func (p *process) publish(disks []registry.Disk, incoming bool) error {
	state := registry.State{
		Started: time.Now().UTC(), CPUs: p.Config.CPUs,
		Memory: uint64(p.Config.Memory.Size), Kernel: p.Config.Kernel,
		Disks: disks, Incoming: incoming && p.handed == nil,
	}
	if p.handed != nil {
		return p.lease.Stage(state)
	}
	return p.lease.Publish(state)
}

// restrict drops the rights of the process.
func (p *process) restrict() error {
	if !p.Config.Sandbox {
		p.log.Warn("the sandbox is off: a guest that breaks out has your rights")
		return nil
	}
	report, err := p.Sandbox(sandbox.Policy{
		RunDir:  p.lease.Dir,
		RunRoot: p.Registry.RunDir(), TakeOver: p.handed != nil,
		// The machine reads its own memory statistics.
		ReadPaths: []string{"/proc/self"},
		IOUring:   len(p.Config.Disks) > 0,
	})
	if err != nil {
		return exit.New(exit.Sandbox, fmt.Errorf("%w: use --sandbox=off to run without", err))
	}
	if report.Warning != "" {
		p.log.Warn("sandbox is incomplete", "missing", report.Warning)
	}
	return nil
}

// operations are what clients can have done with a machine.
func (p *process) operations() *lend.Server {
	operations, kinds := remotesave.Operations(p.machine), remotesave.Kinds()
	maps.Copy(operations, remotemigrate.Operations(p.machine))
	maps.Copy(kinds, remotemigrate.Kinds())
	maps.Copy(operations, remotemigrate.HandOver(p.handOver))
	return lend.NewServer(operations, kinds, p.log)
}

// handOver returns what another process of this host goes on with.
func (p *process) handOver() (*remotemigrate.Belongings, error) {
	b, err := p.machine.HandOver()
	if err != nil {
		return nil, err
	}
	if b.Lock, err = p.lease.Lock(); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

// serve starts the guest and waits for its end, while the API, the console and
// operations are served. It takes the sockets over.
func (p *process) serve(ctx context.Context, start func(context.Context) error) (Exit, error) {
	inputs, stopInputs := context.WithCancel(ctx)
	defer stopInputs()
	sockets := p.sockets
	p.sockets.api, p.sockets.console, p.sockets.ops = nil, nil, nil
	server := api.NewServer(p.machine, p.log)
	server.Serve(sockets.api)
	operations := p.operations()
	operations.Serve(sockets.ops)
	p.hub.Serve(sockets.console, func(keys []byte) { p.machine.WriteInput(inputs, keys) })
	defer func() {
		stopInputs()
		_ = sockets.console.Close()
		p.hub.Close()
		_ = server.Close()
		// A save that ends the machine is not over yet.
		_ = operations.Close()
	}()

	if err := start(ctx); err != nil {
		return Exit{}, err
	}
	if p.Ready != nil {
		p.Ready(p.lease.Name)
	}
	typing := make(chan struct{})
	go func() {
		defer close(typing)
		if p.Input == nil {
			return
		}
		if err := terminal.CopyInput(inputs, p.Input, func(keys []byte) { p.machine.WriteInput(inputs, keys) }); err != nil {
			p.log.Warn("standard input", "err", err)
		}
	}()
	defer func() { stopInputs(); <-typing }()
	return p.wait(ctx)
}

// wait returns how the guest ended. Signals stop it on the way.
func (p *process) wait(ctx context.Context) (Exit, error) {
	type outcome struct {
		exit Exit
		err  error
	}
	done := make(chan outcome, 1)
	go func() {
		e, err := p.machine.Wait(ctx)
		done <- outcome{e, err}
	}()
	stopping, stopped := context.WithCancel(ctx)
	var stops sync.WaitGroup
	defer stops.Wait()
	defer stopped()
	for signals := 0; ; {
		select {
		case o := <-done:
			return o.exit, o.err
		case s := <-p.Signals:
			signals++
			p.log.Info("stopping", "signal", s.String())
			if signals > 1 {
				p.machine.Kill()
				continue
			}
			stops.Go(func() {
				if err := p.machine.Stop(stopping, signalGrace); err != nil && stopping.Err() == nil {
					p.log.Warn("stop", "err", err)
				}
			})
		}
	}
}

// outcome turns how the guest ended into an exit code.
func (p *process) outcome(e Exit, err error) (int, error) {
	switch {
	case err != nil:
		return Classify(err), err
	case e.Err != nil:
		return e.Code, exit.New(e.Code, e.Err)
	case e.Reason == "poweroff" && p.status != nil:
		status, ended := p.status.Status()
		if !ended {
			return exit.Failure, exit.Errorf(exit.Failure, "the guest powered off before the command ended: see ditto logs %s", p.lease.Name)
		}
		return status, nil
	}
	return e.Code, nil
}
