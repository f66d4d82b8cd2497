package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/migration/live"
	"ditto.vm/migration/pki"
	"ditto.vm/vmm/config"
)

// receiveFlags are the flags of receive.
type receiveFlags struct {
	arrivalFlags
	tls                         tlsFlags
	listen                      string
	once, detach, stdio, asJSON bool
}

// arrivalFlags say what is different here with a machine that arrives. The
// receiver hands them to the process that becomes the machine, as text.
type arrivalFlags struct{ runFlags }

// arrivalFlagNames are those of arrivalFlags.
var arrivalFlagNames = []string{"name", "disk", "base", "kernel", "initrd", "net", "forward", "sandbox"}

func (f *arrivalFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	f.text(fs, "name", "n", "NAME", "", "the machine's name here; default the one it has", func(c *config.Config, s string) error { c.Name = s; return nil })
	fs.Var(&listValue{kind: "N=PATH", check: checkDiskPlaces}, "disk", "where the machine's disk N (0 is the first) is here; default the same path; repeat for more")
	fs.Var(&listValue{kind: "PATH", check: func([]string) error { return nil }}, "base", "an image that disks may be stacked on that come without theirs (--disks copy); repeat for more")
	f.text(fs, "kernel", "k", "PATH", "", "where the machine's kernel is here; default the same path", func(c *config.Config, s string) error { c.Kernel = s; return nil })
	f.text(fs, "initrd", "i", "PATH", "", "where the machine's initrd is here; default the same path", func(c *config.Config, s string) error { c.Initrd = s; return nil })
	f.list(fs, "net", "", "NET", "a network instead of the machine's own, in their order; as for ditto run", setNets)
	f.list(fs, "forward", "p", "FORWARD", "a port forward instead of the machine's own, as for ditto run; none for none", replaceForwards)
	f.text(fs, "sandbox", "", "SWITCH", config.OnOff(true).String(), "drop rights before the guest runs: on or off", func(c *config.Config, s string) error { return c.Sandbox.UnmarshalText([]byte(s)) })
	_ = cmd.RegisterFlagCompletionFunc("sandbox", cobra.FixedCompletions([]string{"on", "off"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.MarkFlagFilename("kernel")
	_ = cmd.MarkFlagFilename("initrd")
}

// words are the flags that were given, as a command line.
func (f *arrivalFlags) words(fs *pflag.FlagSet) (words []string) {
	for _, name := range arrivalFlagNames {
		flag := fs.Lookup(name)
		if !flag.Changed {
			continue
		}
		texts := []string{flag.Value.String()}
		if list, ok := flag.Value.(*listValue); ok {
			texts = list.texts
		}
		for _, text := range texts {
			words = append(words, "--"+name+"="+text)
		}
	}
	return words
}

// diskPlace is where a disk of an arriving machine is.
type diskPlace struct {
	disk int
	path string
}

// parseDiskPlace reads N=PATH.
func parseDiskPlace(text string) (p diskPlace, err error) {
	n, path, ok := strings.Cut(text, "=")
	if !ok || path == "" {
		return p, fmt.Errorf("%q: use N=PATH, with 0 for the first disk", text)
	}
	if p.disk, err = parseDiskNumber(n); err != nil {
		return p, err
	}
	p.path = path
	return p, nil
}

func checkDiskPlaces(texts []string) error {
	for _, text := range texts {
		if _, err := parseDiskPlace(text); err != nil {
			return err
		}
	}
	return nil
}

func (e *Env) receiveCommand() *cobra.Command {
	f := &receiveFlags{}
	cmd := &cobra.Command{
		Use:   "receive --listen ADDR",
		Short: "Wait for machines of other hosts",
		Long: `Wait for machines that 'ditto migrate' sends from other hosts. Each goes on in a
background process of its own, as with 'ditto run -d'; 'ditto console' joins its
console. One comes at a time. The command goes on until it is interrupted, or,
with --once, until one machine has arrived; those that have arrived stay.

ADDR is [HOST]:PORT; without a HOST all of this host's addresses. Both sides need
certificates of one authority (--tls-cert, --tls-key, --tls-ca; see 'ditto pki'),
unless ADDR is on the loopback, where machines of the same user, and of root, come.
Who may send a machine decides which files of this host are its disks. With --stdio one machine comes over standard input
and output: 'ditto migrate NAME ssh://HOST' starts it so.

The machine's disks must be here, by the same paths or as --disk says: the same
files, on storage that both hosts see. Its name must be free, and so must the host
ports of its user-mode networks; --name, --net and --forward say others. What is
missing is told to both sides before any memory is sent, and the machine runs on
where it was.

With --json, a line for each event: {"event":"listening",...}, "offered",
"progress", and "arrived" or "failed".`,
		Example: `  ditto receive --listen :7788 --tls-cert b.crt --tls-key b.key --tls-ca ca.crt
  ditto receive --listen 10.0.0.2:7788 --once --disk 0=/srv/web.img -p 8081:80 --insecure
  ditto receive --listen 127.0.0.1:7788 --name web2 --once`,
		GroupID:           groupMachines,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.receive(cmd, f)
		},
	}
	fs := cmd.Flags()
	fs.StringVarP(&f.listen, "listen", "l", "", "the `ADDR` to wait at")
	fs.BoolVar(&f.stdio, "stdio", false, "receive one machine over standard input and output")
	fs.BoolVar(&f.once, "once", false, "end when one machine has arrived, or failed to")
	fs.BoolVarP(&f.detach, "detach", "d", false, "wait in the background, and print the address and the process's number")
	fs.BoolVar(&f.asJSON, "json", false, "print events as JSON, one a line")
	fs.StringVar(&f.logLevel, "log-level", "warn", "what ditto logs about itself: debug, info, warn or error")
	_ = cmd.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions([]string{"debug", "info", "warn", "error"}, cobra.ShellCompDirectiveNoFileComp))
	f.arrivalFlags.add(cmd)
	f.tls.add(cmd)
	cmd.MarkFlagsOneRequired("listen", "stdio")
	cmd.MarkFlagsMutuallyExclusive("listen", "stdio")
	for _, name := range []string{"once", "detach", "tls-cert", "insecure"} {
		cmd.MarkFlagsMutuallyExclusive("stdio", name)
	}
	return cmd
}

// receive waits for machines.
func (e *Env) receive(cmd *cobra.Command, f *receiveFlags) error {
	level, err := parseLevel(f.logLevel)
	if err != nil {
		return err
	}
	credentials, err := f.tls.load()
	if err != nil {
		return err
	}
	job := receiveJob{Words: f.words(cmd.Flags()), TLS: credentials, Insecure: f.tls.insecure, LogLevel: level, Once: f.once, JSON: f.asJSON}
	if f.stdio {
		return e.receiveStdio(cmd.Context(), job)
	}
	l, err := listenForMachines(cmd.Context(), f.listen, credentials, f.tls.insecure)
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }() // whoever receives has a copy
	if f.detach {
		return e.receiveDetached(job, l)
	}
	return e.receiveLoop(cmd.Context(), job, l)
}

// listenForMachines makes the socket that machines come by.
func listenForMachines(ctx context.Context, address string, c *pki.Credentials, insecure bool) (*net.TCPListener, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil && !strings.Contains(address, ":") {
		host, port, err = address, DefaultPort, nil
	}
	if err != nil {
		return nil, exit.Errorf(exit.Usage, "--listen %q: use [HOST]:PORT", address)
	}
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	l, err := config.Listen(ctx, "tcp", net.JoinHostPort(host, port))
	if err != nil {
		return nil, exit.New(exit.Net, fmt.Errorf("--listen %s: %w", address, err))
	}
	if !l.Addr().(*net.TCPAddr).IP.IsLoopback() && c == nil && !insecure {
		return nil, errors.Join(exit.Errorf(exit.Usage, "--listen %s can be reached from other hosts: give --tls-cert, --tls-key and --tls-ca ('ditto pki' makes them), listen on 127.0.0.1, or say --insecure", address), l.Close())
	}
	return l.(*net.TCPListener), nil
}

// arrivalConfig makes the configuration for this host out of an offered one.
func arrivalConfig(o *live.Offer, words []string) (config.Config, error) {
	cfg, err := config.Parse(o.Config)
	if err == nil {
		err = cfg.Validate()
	}
	if len(o.Config) == 0 {
		err = errors.New("there is none")
	}
	if err != nil {
		return cfg, exit.Errorf(exit.Migration, "the configuration of the machine: %w", err)
	}
	m := savedMachine{config: cfg}
	if err := m.settle(); err != nil {
		return cfg, exit.New(exit.Migration, err)
	}
	f := &arrivalFlags{}
	cmd := &cobra.Command{}
	f.add(cmd)
	if err := cmd.ParseFlags(words); err != nil {
		return cfg, exit.New(exit.Usage, err)
	}
	if err := m.apply(&f.runFlags, cmd.Flags()); err != nil {
		return cfg, err
	}
	o.Layers = slices.Clone(o.Layers)
	for i := range o.Layers {
		switch l := &o.Layers[i]; {
		case l.Disk >= 0:
		case l.Path == cfg.Kernel:
			l.Path = m.config.Kernel
		case l.Path == cfg.Initrd:
			l.Path = m.config.Initrd
		}
	}
	o.Bases = cmd.Flags().Lookup("base").Value.(*listValue).texts
	places := cmd.Flags().Lookup("disk").Value.(*listValue).texts
	return m.config, placeDisks(&m.config, o, places)
}

// placeDisks says where the disks of an offered machine are here.
func placeDisks(cfg *config.Config, o *live.Offer, places []string) error {
	cfg.Disks = slices.Clone(cfg.Disks)
	for _, text := range places {
		p, err := parseDiskPlace(text)
		if err != nil {
			return exit.New(exit.Usage, err)
		}
		if p.disk >= len(cfg.Disks) {
			return exit.Errorf(exit.Disk, "--disk %s: the machine has %d disks: they count from 0", text, len(cfg.Disks))
		}
		cfg.Disks[p.disk].Path = p.path
		for i := range o.Layers {
			if o.Layers[i].Disk == p.disk && o.Layers[i].Depth == 0 {
				o.Layers[i].Path = p.path
			}
		}
	}
	return nil
}
