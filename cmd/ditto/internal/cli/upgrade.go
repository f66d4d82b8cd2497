package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/vmproc"
	"ditto.vm/migration/live"
	"ditto.vm/vmm/lend/remotemigrate"
	"ditto.vm/vmm/registry"
)

// upgradeFlags are the flags of upgrade.
type upgradeFlags struct{ all, asJSON bool }

func (e *Env) upgradeCommand() *cobra.Command {
	f := &upgradeFlags{}
	cmd := &cobra.Command{
		Use:   "upgrade NAME... | --all",
		Short: "Hand running machines to this ditto",
		Long: `Hand running machines to this ditto, which may be newer than the one that they were
started with: a migration from one process of this host to another. Each keeps its
name, its disks and its logs, and 'ditto ps' shows it all the time.

The memory of a machine started with --memory memfd is handed over as it is: the
guest stands still for a moment, and no page is copied. Any other memory is copied
while the guest runs, as in a migration, which takes as much free memory again.

Whatever fails, the machine runs on in its old process, up to the commit: the
moment in which the new process takes over. Until then the new process cannot
change a byte of memory that is shared, and Ctrl-C cancels. How long the guest
stood still is printed.

User-mode networks begin anew: connections through them end, and their port
forwards move with the machine. A machine whose root is a temporary overlay
cannot be handed over.`,
		Example: `  ditto run -d --name web --memory 4G,memfd --disk web.img
  ditto upgrade web                                # after a new ditto was installed
  /opt/ditto-2/bin/ditto upgrade --all --json`,
		GroupID: groupMachines,
		Args: func(_ *cobra.Command, args []string) error {
			if f.all == (len(args) > 0) {
				return exit.Errorf(exit.Usage, "name the machines, or say --all")
			}
			return nil
		},
		ValidArgsFunction: e.completeRunning,
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.upgradeAll(cmd.Context(), args, f)
		},
	}
	cmd.Flags().BoolVar(&f.all, "all", false, "all running machines, one after the other")
	cmd.Flags().BoolVar(&f.asJSON, "json", false, "print events as JSON, one a line")
	return cmd
}

// upgradeAll upgrades machines one after the other. One that fails does not keep
// the others from it.
func (e *Env) upgradeAll(ctx context.Context, names []string, f *upgradeFlags) error {
	r, err := e.Registry()
	if err != nil {
		return err
	}
	if f.all {
		vms, err := r.List()
		if err != nil {
			return err
		}
		for _, vm := range vms {
			names = append(names, vm.Name)
		}
	}
	var failed []error
	for _, name := range names {
		if ctx.Err() != nil {
			return errors.Join(append(failed, ctx.Err())...)
		}
		err := e.upgrade(ctx, r, name, f.asJSON)
		if err != nil && len(names) > 1 {
			fmt.Fprintf(e.Stderr, "ditto: %s\n", oneLine(err))
			err = exit.Errorf(vmproc.Classify(err), "%s is not upgraded", name)
		}
		if err != nil {
			failed = append(failed, err)
		}
	}
	return errors.Join(failed...)
}

// upgrade hands one machine to a process of this program.
func (e *Env) upgrade(ctx context.Context, r *registry.Registry, name string, asJSON bool) error {
	vm, err := find(r, name)
	if err != nil {
		return err
	}
	own, err := remotemigrate.CallHandOver(ctx, vm.OpsSocket())
	if err != nil {
		if strings.Contains(err.Error(), "does not know the operation") {
			err = fmt.Errorf("%s was started by a ditto that cannot hand machines over; it moves with 'ditto migrate', or restart it: %w", name, err)
		}
		return exit.New(exit.Migration, err)
	}
	shared := len(own.Memory) > 0
	u, err := e.beginUpgrade(r, name, own)
	if err = errors.Join(err, own.Close()); err != nil {
		return exit.New(exit.Migration, fmt.Errorf("%s runs on as it was: %w", name, err))
	}
	defer u.close()
	if !shared {
		fmt.Fprintf(e.Stderr, "ditto: %s has no --memory memfd: its memory is copied\n", name)
	}
	where := fmt.Sprintf("process %d of this host (%s)", u.child.process.Pid, e.Version)
	o := remotemigrate.Options{Where: where, Trusted: true, Shared: shared, SameHost: true, Stall: upgradeStall}
	show := e.newMigrateDisplay(vm, asJSON)
	report, err := remotemigrate.Call(ctx, vm.OpsSocket(), u.dial, o, show.event)
	show.close()
	if err != nil {
		if why := u.why(); why != nil && !errors.Is(err, remotemigrate.ErrInDoubt) && ctx.Err() == nil {
			err = why
		}
		return e.migrateFailed(ctx, r, vm, where, err, asJSON)
	}
	if err := waitGone(context.WithoutCancel(ctx), r, vm, killTimeout); err != nil {
		return err
	}
	return e.printUpgraded(vm, where, report, asJSON)
}

// upgradeStall is how long either process may get no further: both are here.
const upgradeStall = 20 * time.Second

// printUpgraded tells what it took.
func (e *Env) printUpgraded(vm registry.VM, where string, r live.Report, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(e.Stdout).Encode(migrateResult{"upgraded", vm.Name, r})
	}
	how := "shared, and none of it copied"
	if r.Mode != "shared" {
		how = "copied"
	}
	_, err := fmt.Fprintf(e.Stdout, "%s runs in %s: %s of memory %s, in %s; it stood still for %s\n", vm.Name, where,
		humanBytes(r.RAM), how, r.Total.Round(time.Millisecond), r.Downtime.Round(10*time.Microsecond))
	return err
}

// upgradeJob is what a receiving process takes over.
type upgradeJob struct {
	Name string `json:"name"`
	// Memory is the number of files of memory. The descriptors after the listener's
	// are the lock and these.
	Memory int `json:"memory"`
}

// files makes the belongings of the descriptors.
func (j upgradeJob) files() *remotemigrate.Belongings {
	next := socketFD + 1
	open := func(what string) *os.File {
		unix.CloseOnExec(next)
		next++
		return os.NewFile(uintptr(next-1), what)
	}
	b := &remotemigrate.Belongings{Lock: open("lock")}
	for range j.Memory {
		b.Memory = append(b.Memory, open("guest memory"))
	}
	return b
}

// upgrading is an upgrade, seen by the client.
type upgrading struct {
	listener *net.UnixListener
	path     string
	child    *spawned
	outcomes *vmproc.Outcomes
	ended    chan struct{} // closed when the child tells no more
	failed   error         // why there is no machine; of the child, until ended
}

// beginUpgrade starts the process that takes a machine over. Both talk over a
// socket in the run directory, which is the user's alone.
func (e *Env) beginUpgrade(r *registry.Registry, name string, own *remotemigrate.Belongings) (u *upgrading, err error) {
	u = &upgrading{path: filepath.Join(r.RunDir(), fmt.Sprintf(".up%d", os.Getpid())), ended: make(chan struct{})}
	if u.outcomes, err = vmproc.OpenOutcomes(filepath.Join(r.RunDir(), outcomesFolder)); err != nil {
		return nil, err
	}
	_ = os.Remove(u.path) // of another process of this number
	if u.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: u.path, Net: "unix"}); err != nil {
		return nil, err
	}
	socket, err := u.listener.File()
	if err != nil {
		return nil, errors.Join(err, u.listener.Close())
	}
	defer func() { _ = socket.Close() }() // the child has its own
	job := receiveJob{Insecure: true, Upgrade: &upgradeJob{Name: name, Memory: len(own.Memory)}}
	files := append([]*os.File{socket, own.Lock}, own.Memory...)
	if u.child, err = spawn(childJob{Receive: &job}, files...); err != nil {
		return nil, errors.Join(err, u.listener.Close())
	}
	go u.follow()
	return u, nil
}

// follow waits until the machine is here, or will not be. When the process is gone
// without one, this one tells what became of it.
func (u *upgrading) follow() {
	show := &receiveDisplay{last: true, quiet: true}
	u.failed = u.child.follow(show)
	close(u.ended)
	if u.failed == nil {
		return
	}
	if err := u.unblock(); err != nil {
		return // the outcome cannot be asked for, and is looked for in vain
	}
	for {
		c, err := u.listener.Accept()
		if err != nil {
			return
		}
		_ = live.AnswerOutcome(c, upgradeStall, u.outcomes.Lookup) // who asks wrongly gets nothing
	}
}

// unblock makes accepting end when the listener is closed. Handing it to a process
// makes the socket one that blocks, for both, until that process has begun.
func (u *upgrading) unblock() error {
	raw, err := u.listener.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = unix.SetNonblock(int(fd), true) })
	return errors.Join(err, failed)
}

// why is the reason of the new process, if it has given up.
func (u *upgrading) why() error {
	select {
	case <-u.ended:
		return u.failed
	case <-time.After(time.Second):
		return nil
	}
}

// dial connects to the new process, or to this one when it is gone.
func (u *upgrading) dial(ctx context.Context) (*os.File, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", u.path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }() // the file is a copy
	return c.(*net.UnixConn).File()
}

// close lets go of the new process, which goes on if it has the machine.
func (u *upgrading) close() {
	_ = u.listener.Close()
	u.child.close()
}
