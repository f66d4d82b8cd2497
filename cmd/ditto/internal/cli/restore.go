package cli

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/adrg/xdg"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/vmproc"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/registry"
)

// restoreFlags are the flags of restore and clone: how a saved machine comes
// back, and what may be different with it.
type restoreFlags struct {
	runFlags
	name            string
	eager, prefetch bool
	overlays        string
}

func (f *restoreFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.BoolVar(&f.eager, "eager", false, "read all of memory before the guest runs, instead of when it is touched")
	fs.BoolVar(&f.prefetch, "prefetch", false, "read first what an earlier restore touched first")
	cmd.MarkFlagsMutuallyExclusive("eager", "prefetch")
	fs.StringVar(&f.overlays, "overlay-dir", "", "`FOLDER` that gets a folder with the overlays of the disks; default ~/.local/share/ditto")
	fs.StringVar(&f.logLevel, "log-level", "warn", "what ditto logs about itself: debug, info, warn or error")
	f.list(fs, "net", "", "NET", "a network instead of the saved one, in the order of the saved ones; as for ditto run", setNets)
	f.list(fs, "forward", "p", "FORWARD", "a port forward instead of the saved ones, as for ditto run; none for none", replaceForwards)
	f.text(fs, "sandbox", "", "SWITCH", config.OnOff(true).String(), "drop rights before the guest runs: on or off", func(c *config.Config, s string) error { return c.Sandbox.UnmarshalText([]byte(s)) })
	_ = cmd.RegisterFlagCompletionFunc("sandbox", cobra.FixedCompletions([]string{"on", "off"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions([]string{"debug", "info", "warn", "error"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.MarkFlagDirname("overlay-dir")
}

// replaceForwards puts forwards in the place of all there are.
func replaceForwards(c *config.Config, texts []string) error {
	c.Nets = slices.Clone(c.Nets)
	for i := range c.Nets {
		c.Nets[i].Forwards = nil
	}
	if slices.Equal(texts, []string{"none"}) {
		return nil
	}
	return addForwards(c, texts)
}

// mode is how memory comes back.
func (f *restoreFlags) mode() vmm.RestoreMode {
	switch {
	case f.eager:
		return vmm.RestoreEager
	case f.prefetch:
		return vmm.RestorePrefetch
	}
	return vmm.RestoreLazy
}

// overlayDir is the folder of the machines' overlays.
func (f *restoreFlags) overlayDir() (string, error) {
	if f.overlays != "" {
		return filepath.Abs(f.overlays)
	}
	return filepath.Join(xdg.DataHome, "ditto"), nil
}

func (e *Env) restoreCommand() *cobra.Command {
	f := &restoreFlags{}
	cmd := &cobra.Command{
		Use:   "restore DIR",
		Short: "Let a saved machine go on",
		Long: `Let a machine go on where it was saved, in a process of its own as ditto run does.
The snapshot is not changed, and may be restored again.

Memory is read when the guest touches it. The disks that the machine writes
become overlays on the images that the snapshot froze, as NAME/blkN.qcow2 in
~/.local/share/ditto or --overlay-dir; they stay when the machine ends.

The machine is what it was, with the same addresses. If another one has its name,
its tap device or its ports, say others with --name, --net and --forward. The
guest notices that it was restored: its generation ID is another.

NET and FORWARD are as for ditto run. --net is given once for each network that
the machine had.`,
		Example: `  ditto restore /var/snap/web1
  ditto restore /var/snap/web1 --name web-test -p 8081:80 -d
  ditto restore /var/snap/web1 --net user
  ditto restore /var/snap/web1 --eager --overlay-dir /fast/overlays`,
		GroupID:           groupMachines,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeSnapshot,
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.restore(cmd, args[0], f)
		},
	}
	fs := cmd.Flags()
	fs.StringVarP(&f.name, "name", "n", "", "the machine's `NAME`; default the one it had")
	fs.BoolVarP(&f.detach, "detach", "d", false, "run in the background and print the name")
	f.add(cmd)
	return cmd
}

// restore lets one machine go on.
func (e *Env) restore(cmd *cobra.Command, dir string, f *restoreFlags) error {
	level, err := parseLevel(f.logLevel)
	if err != nil {
		return err
	}
	m, err := openSaved(dir)
	if err != nil {
		return err
	}
	if f.name != "" {
		m.config.Name = f.name
	}
	if err := m.apply(&f.runFlags, cmd.Flags()); err != nil {
		return err
	}
	overlays, err := f.overlayDir()
	if err != nil {
		return err
	}
	if err := e.addressesFree(cmd.Context(), m.config); err != nil {
		return err
	}
	return e.launch(cmd.Context(), childJob{
		Config: m.config, LogLevel: level,
		Restore: &vmproc.Restore{Dir: m.dir, ID: m.id, Mode: f.mode(), Overlays: overlays},
	}, f.detach)
}

// savedMachine is what a snapshot says of its machine.
type savedMachine struct {
	dir    string
	id     snapshot.ID
	config config.Config
}

// openSaved reads how the machine in a snapshot was made. Its networks have the
// addresses that the guest knows, and its sandbox is on: whoever made a snapshot
// does not decide about the rights of who restores it.
func openSaved(dir string) (savedMachine, error) {
	snap, err := snapshot.Open(dir, snapshot.OpenOptions{})
	if err != nil {
		return savedMachine{}, exit.New(exit.Snapshot, err)
	}
	defer func() { _ = snap.Close() }() // it was only read
	m := savedMachine{dir: snap.Dir(), id: snap.ID()}
	text := snap.Manifest().Config
	if len(text) == 0 {
		return m, exit.Errorf(exit.Snapshot, "snapshot %s does not say what machine it is of", m.dir)
	}
	if m.config, err = config.Parse(text); err == nil {
		err = m.config.Validate()
	}
	if err != nil {
		return m, exit.Errorf(exit.Snapshot, "snapshot %s: configuration: %w", m.dir, err)
	}
	return m, exit.New(exit.Snapshot, m.settle())
}

// settle gives networks the addresses that the guest knows, and switches the
// sandbox on: where a machine comes from does not decide about its rights here.
func (m *savedMachine) settle() error {
	m.config.Sandbox = true
	m.config.Nets = slices.Clone(m.config.Nets)
	for i := range m.config.Nets {
		mac, err := m.config.Nets[i].HardwareAddr(m.config.Name, i)
		if err != nil {
			return err
		}
		m.config.Nets[i].MAC = mac.String()
	}
	return nil
}

// apply changes the configuration by the flags. Networks that are given keep
// what the guest knows of the saved ones.
func (m *savedMachine) apply(f *runFlags, fs *pflag.FlagSet) error {
	saved := m.config.Nets
	if err := f.apply(fs, &m.config); err != nil {
		return exit.New(exit.Usage, err)
	}
	if len(m.config.Nets) != len(saved) {
		return exit.Errorf(exit.Usage, "the machine has %d networks, and --net was given for %d: give one for each", len(saved), len(m.config.Nets))
	}
	for i := range m.config.Nets {
		n := &m.config.Nets[i]
		if n.MAC == "" {
			n.MAC = saved[i].MAC
		}
		if n.MTU == 0 {
			n.MTU = saved[i].MTU
		}
		if n.MTU != saved[i].MTU {
			return exit.Errorf(exit.Usage, "network %d has an MTU that the guest knows, %d: leave out mtu=%d", i, saved[i].MTU, n.MTU)
		}
	}
	return m.config.Validate()
}

// addressesFree refuses to put two machines of one address on networks that
// others can reach.
func (e *Env) addressesFree(ctx context.Context, cfg config.Config) error {
	r, err := e.Registry()
	if err != nil {
		return err
	}
	vms, err := r.List()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	for _, vm := range vms {
		taken := sharedAddresses(ctx, vm)
		for i, n := range cfg.Nets {
			if n.Mode != config.NetUser && taken[strings.ToLower(n.MAC)] {
				return exit.Errorf(exit.Net, "network %d: %s has the address %s already: stop it, or give this one a network of its own with --net user, or another address with --net %s,mac=ADDRESS",
					i, vm.Name, n.MAC, n.Mode)
			}
		}
	}
	return nil
}

// userNetBackend is how the API calls a user-mode network, which each machine has
// for itself.
const userNetBackend = "ditto-netd"

// sharedAddresses are the MAC addresses of a machine on networks that others can
// reach. A machine that does not answer has none.
func sharedAddresses(ctx context.Context, vm registry.VM) map[string]bool {
	taken := map[string]bool{}
	remote, err := api.Dial(vm.APISocket())
	if err != nil {
		return taken
	}
	defer remote.Close()
	info, err := remote.Info(ctx)
	if err != nil {
		return taken
	}
	for _, d := range info.Devices {
		if d.MAC != "" && d.Backend != userNetBackend {
			taken[strings.ToLower(d.MAC)] = true
		}
	}
	return taken
}

// completeSnapshot completes the one folder of a snapshot.
func completeSnapshot(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return completeSnapshots(cmd, args, word)
}

// completeSnapshots completes folders: those of snapshots, or those on the way.
func completeSnapshots(_ *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
	dir, prefix := filepath.Split(word)
	entries, err := os.ReadDir(filepath.Join(".", dir))
	if filepath.IsAbs(dir) {
		entries, err = os.ReadDir(dir)
	}
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var found, ways []string
	for _, entry := range entries {
		name := entry.Name()
		if !entry.IsDir() || !strings.HasPrefix(name, prefix) || strings.HasPrefix(name, ".") && prefix == "" {
			continue
		}
		if exists(filepath.Join(dir, name, snapshot.ManifestName)) {
			found = append(found, dir+name)
		} else {
			ways = append(ways, dir+name+"/")
		}
	}
	if len(found) > 0 {
		return append(found, ways...), cobra.ShellCompDirectiveNoFileComp
	}
	return ways, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}
