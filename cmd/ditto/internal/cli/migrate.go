package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/vmproc"
	"ditto.vm/migration/live"
	"ditto.vm/migration/pki"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/lend"
	"ditto.vm/vmm/lend/remotemigrate"
	"ditto.vm/vmm/registry"
)

// migrateFlags are the flags of migrate.
type migrateFlags struct {
	tls                 tlsFlags
	serverName          string
	bandwidth           string
	onTimeout           string
	compress, proof     string
	ssh                 string
	receive             []string
	connections         int
	downtime, timeout   time.Duration
	postcopy, noNames   bool
	noThrottle, asJSON  bool
	verify, copyLayers  bool
	disks               string
	connectionsWereSaid bool
}

func (e *Env) migrateCommand() *cobra.Command {
	f := &migrateFlags{}
	cmd := &cobra.Command{
		Use:   "migrate NAME DESTINATION",
		Short: "Move a running machine to another host",
		Long: `Move a running machine to another host, where 'ditto receive' waits for it. The
guest runs on while its memory is sent, stands still for a moment, and goes on
over there. Memory that equals blocks of disks that the other host can read is
sent by name: the other host reads it, and proves it by its digest.

DESTINATION is tcp://HOST[:PORT], PORT being ` + DefaultPort + ` if it is left out, or
ssh://[USER@]HOST[:PORT][/PATH/OF/DITTO], which runs 'ditto receive --stdio' there
by your own ssh. Over tcp:// both sides need certificates (--tls-cert, --tls-key,
--tls-ca; see 'ditto pki'), unless the way is this host's own loopback.

Whatever fails, the machine runs on here as if nothing had happened, up to the
commit: the moment in which the other host takes over. Ctrl-C cancels until then.
If the connection ends in that very moment, the other host is asked what became
of it; as long as it cannot be reached, the machine stands still here (exit code
19). The same command asks again; 'ditto resume --take-back' takes the machine
back, when you have made sure that it does not run there.

With --json, a line for each event: {"event":"progress",...}, and at the end
{"event":"migrated",...} or {"event":"failed",...}.`,
		Example: `  ditto receive --listen :7788 --tls-cert b.crt --tls-key b.key --tls-ca ca.crt     # on hostb
  ditto migrate web tcp://hostb --tls-cert a.crt --tls-key a.key --tls-ca ca.crt
  ditto migrate web ssh://root@hostb
  ditto migrate web ssh://hostb/opt/ditto/bin/ditto --receive=--disk=0=/srv/web.img
  ditto migrate web tcp://hostb --bandwidth 50M --downtime 100ms --timeout 5m --on-timeout stop --insecure`,
		GroupID:           groupMachines,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: e.completeMigrate,
		RunE: func(cmd *cobra.Command, args []string) error {
			f.connectionsWereSaid = cmd.Flags().Changed("connections")
			return e.migrate(cmd.Context(), args[0], args[1], f)
		},
	}
	f.add(cmd)
	return cmd
}

func (f *migrateFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.DurationVar(&f.downtime, "downtime", 300*time.Millisecond, "how long the guest may stand still")
	fs.StringVar(&f.bandwidth, "bandwidth", "0", "most bytes a second to send while the guest runs, with a unit; 0 for no limit")
	fs.DurationVar(&f.timeout, "timeout", 0, "how long sending may take while the guest runs; 0 for ever")
	fs.StringVar(&f.onTimeout, "on-timeout", string(live.TimeoutAbort), "what then: abort, stop (the guest stands still until the rest is sent) or postcopy")
	fs.BoolVar(&f.postcopy, "postcopy", false, "let the guest run over there early, and fetch what is missing when it is touched; if the network fails then, the guest waits")
	fs.IntVar(&f.connections, "connections", live.DefaultConnections, "connections for memory over tcp://, beside the one that controls")
	fs.StringVar(&f.compress, "compress", string(live.Uncompressed), "compression of what is sent as bytes: none or zstd")
	fs.StringVar(&f.proof, "proof", string(live.ProofXXH3), "how named memory is proven: xxh3, with a secret of each migration, or blake3")
	fs.BoolVar(&f.noNames, "no-names", false, "send all memory as bytes")
	fs.BoolVar(&f.noThrottle, "no-throttle", false, "never slow down a guest that writes faster than memory can be sent")
	fs.BoolVar(&f.verify, "verify", false, "compare digests of all memory while the guest stands still, which takes time from it")
	fs.StringVar(&f.disks, "disks", "", "where the disks are: shared (both hosts see the same files) or copy (their blocks are sent); default shared if the destination can prove it")
	fs.BoolVar(&f.copyLayers, "copy-layers", false, "with --disks copy, send images below the disks, too, if the destination lacks them")
	fs.StringVar(&f.serverName, "tls-server-name", "", "`NAME` that the destination's certificate must be for; default the host of tcp://")
	fs.StringVar(&f.ssh, "ssh", "ssh", "the ssh `COMMAND` for ssh://, with options")
	fs.StringArrayVar(&f.receive, "receive", nil, "an `OPTION` for 'ditto receive' at the other end of ssh://; repeat for more")
	fs.BoolVar(&f.asJSON, "json", false, "print events as JSON, one a line")
	f.tls.add(cmd)
	complete := func(name string, words ...string) {
		_ = cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
	}
	complete("on-timeout", string(live.TimeoutAbort), string(live.TimeoutStop), string(live.TimeoutPostcopy))
	complete("compress", string(live.Uncompressed), string(live.Zstd))
	complete("disks", string(live.StorageShared), string(live.StorageCopied))
	complete("proof", string(live.ProofXXH3), string(live.ProofBLAKE3))
}

// completeMigrate completes the name of a machine, and how to get there.
func (e *Env) completeMigrate(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	switch len(args) {
	case 0:
		return e.completeRunning(cmd, args, word)
	case 1:
		return []string{"tcp://", "ssh://"}, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// options are the flags as the machine takes them.
func (f *migrateFlags) options(d destination) (o remotemigrate.Options, err error) {
	bandwidth, err := parseBandwidth(f.bandwidth)
	if err != nil {
		return o, exit.New(exit.Usage, err)
	}
	o = remotemigrate.Options{
		Where: d.text, Connections: f.connections, NoNames: f.noNames, Proof: live.Proof(f.proof),
		Compression: live.Compression(f.compress), Bandwidth: bandwidth, Downtime: f.downtime, Timeout: f.timeout,
		OnTimeout: live.TimeoutPolicy(f.onTimeout), NoThrottle: f.noThrottle, Postcopy: f.postcopy, Verify: f.verify,
		Disks: live.Storage(f.disks), CopyLayers: f.copyLayers,
	}
	if len(d.ssh) > 0 {
		if f.connectionsWereSaid && f.connections != 0 {
			return o, exit.Errorf(exit.Usage, "--connections %d: ssh:// is one connection: leave it out", f.connections)
		}
		o.Connections, o.Trusted = 0, true
	}
	credentials, err := f.tls.load()
	if err != nil {
		return o, err
	}
	if err := f.addTLS(&o, d, credentials); err != nil {
		return o, exit.New(exit.Usage, err)
	}
	if f.downtime <= 0 {
		return o, exit.Errorf(exit.Usage, "--downtime %s is out of range: use more than 0s", f.downtime)
	}
	return o, exit.New(exit.Usage, o.Check())
}

// addTLS adds the credentials, if there are any.
func (f *migrateFlags) addTLS(o *remotemigrate.Options, d destination, c *pki.Credentials) error {
	switch {
	case c == nil && f.serverName != "":
		return errors.New("--tls-server-name needs --tls-cert, --tls-key and --tls-ca")
	case c == nil:
		return nil
	case len(d.ssh) > 0:
		return errors.New("ssh:// encrypts by itself: leave out --tls-cert, --tls-key and --tls-ca")
	}
	name := f.serverName
	if name == "" {
		name = d.host
	}
	o.TLS = &remotemigrate.TLS{Credentials: *c, Name: name}
	return nil
}

// parseBandwidth reads bytes a second.
func parseBandwidth(s string) (uint64, error) {
	if s == "0" {
		return 0, nil
	}
	size, err := config.ParseBytes(strings.TrimSuffix(s, "/s"))
	if err != nil {
		return 0, fmt.Errorf("--bandwidth: %w", err)
	}
	return uint64(size), nil
}

// migrate moves a running machine.
func (e *Env) migrate(ctx context.Context, name, where string, f *migrateFlags) error {
	d, err := parseDestination(where, f.ssh, f.receive)
	if err != nil {
		return err
	}
	o, err := f.options(d)
	if err != nil {
		return err
	}
	r, err := e.Registry()
	if err != nil {
		return err
	}
	vm, err := find(r, name)
	if err != nil {
		return err
	}
	c := &caller{destination: d, plainAllowed: o.TLS != nil || f.tls.insecure, stderr: os.Stderr}
	show := e.newMigrateDisplay(vm, f.asJSON)
	report, err := remotemigrate.Call(ctx, vm.OpsSocket(), c.dial, o, show.event)
	show.close()
	c.close()
	if err != nil && c.refused {
		return exit.New(exit.Usage, errPlain)
	}
	if err != nil {
		return e.migrateFailed(ctx, r, vm, where, err, f.asJSON)
	}
	if err := waitGone(context.WithoutCancel(ctx), r, vm, killTimeout); err != nil {
		return err
	}
	if ctx.Err() != nil {
		fmt.Fprintf(e.Stderr, "ditto: it was too late to cancel: %s has taken over\n", where)
	}
	return e.printMigrated(vm, where, report, f.asJSON)
}

// migrateFailed says what became of a machine that did not go.
func (e *Env) migrateFailed(ctx context.Context, r *registry.Registry, vm registry.VM, where string, err error, asJSON bool) error {
	if errors.Is(err, lend.ErrGone) || errors.Is(err, lend.ErrEnding) {
		err = e.migrateGone(ctx, r, vm, where, err)
	}
	failed := migrateError(err, vm.Name)
	if asJSON {
		_ = json.NewEncoder(e.Stdout).Encode(migrateFailure{"failed", vm.Name, where, oneLine(failed), vmproc.Classify(failed)}) // the exit code tells it too
	}
	return failed
}

// migrateGone finds out about a machine whose process has ended, or does not
// answer.
func (e *Env) migrateGone(ctx context.Context, r *registry.Registry, vm registry.VM, where string, err error) error {
	if waitGone(context.WithoutCancel(ctx), r, vm, goneTimeout) != nil {
		return exit.New(exit.InDoubt, fmt.Errorf("%s does not say what became of its migration to %s: look at 'ditto ps' on both sides (%w)", vm.Name, where, err))
	}
	if last, e := r.LastExit(vm.Name); e == nil && last.Reason == "migrated" {
		return exit.New(exit.InDoubt, fmt.Errorf("%s went to %s, and its process did not live to tell (%w)", vm.Name, last.Where, err))
	}
	return exit.New(exit.Migration, fmt.Errorf("%s ended meanwhile%s (%w)", vm.Name, howEnded(r, vm.Name), err))
}

// goneTimeout is how long a process may take to end that does not answer.
const goneTimeout = 3 * time.Second

// migrateError gives the error of a migration its exit code and its cure.
func migrateError(err error, name string) error {
	var coded *exit.Error
	switch {
	case errors.As(err, &coded):
		return err
	case errors.Is(err, remotemigrate.ErrInDoubt):
		return exit.New(exit.InDoubt, fmt.Errorf("%w: run the same command again to ask again; if %s does not run there, take it back with 'ditto resume --take-back %s'; if it does, end it here with 'ditto kill %s'", err, name, name, name))
	case errors.Is(err, remotemigrate.ErrStuck):
		return exit.New(exit.InDoubt, fmt.Errorf("%w: it runs nowhere else: try 'ditto resume --take-back %s'", err, name))
	case errors.Is(err, context.Canceled):
		return exit.Errorf(exit.Failure, "interrupted: %s runs on here", name)
	case errors.Is(err, remotemigrate.ErrBusy), errors.Is(err, lend.ErrProtocol):
		return exit.New(exit.Migration, err)
	}
	return exit.New(exit.Migration, fmt.Errorf("%s is not migrated, and runs on here: %w", name, err))
}
