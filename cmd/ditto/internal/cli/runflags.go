package cli

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ditto.vm/vmm/config"
)

// runFlags are the flags of run.
type runFlags struct {
	file        string
	detach      bool
	printConfig bool
	logLevel    string
	// changes are applied to the configuration in this order, those of flags
	// that were given only.
	changes []change
}

// change is what a flag does to the configuration.
type change struct {
	flag  string
	apply func(*config.Config) error
}

// add defines the flags on fs.
func (f *runFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	def := config.Default()
	fs.StringVarP(&f.file, "file", "f", "", "read the configuration from a YAML `FILE`; flags override it")
	fs.BoolVarP(&f.detach, "detach", "d", false, "run in the background and print the name")
	fs.BoolVar(&f.printConfig, "print-config", false, "print the configuration as YAML and do nothing")
	fs.StringVar(&f.logLevel, "log-level", "warn", "what ditto logs about itself: debug, info, warn or error")

	f.text(fs, "name", "n", "NAME", "", "the machine's name; default vm1, vm2, ...", func(c *config.Config, s string) error { c.Name = s; return nil })
	f.integer(fs, "cpus", "c", def.CPUs, "number of vCPUs, 1 to 64", func(c *config.Config, n int) { c.CPUs = n })
	f.text(fs, "cpu", "", "CPU", def.CPU, "what the vCPUs can do: host, baseline or a file of ditto cpu", setCPU)
	f.text(fs, "memory", "m", "SIZE", def.Memory.Size.String(), "the guest's memory, with a unit; or memfd for memory that another process can map", setMemory)
	f.text(fs, "hugepages", "", "KIND", def.Memory.HugePages.String(), "pages behind the memory: thp, 2M, 1G or off", func(c *config.Config, s string) error {
		return c.Memory.HugePages.UnmarshalText([]byte(s))
	})
	f.text(fs, "tracker", "", "KIND", def.Memory.Tracker.String(), "how written pages are found: auto, wp-async, kvm-log, kvm-ring or none", func(c *config.Config, s string) error {
		return c.Memory.Tracker.UnmarshalText([]byte(s))
	})
	f.text(fs, "names", "", "SWITCH", def.Memory.Names.String(), "keep track of which pages equal blocks of disks: on or off", func(c *config.Config, s string) error {
		return c.Memory.Names.UnmarshalText([]byte(s))
	})
	f.text(fs, "kernel", "k", "KERNEL", "", "path of a kernel, or name of a cached one; default the newest cached", func(c *config.Config, s string) error { c.Kernel = s; return nil })
	f.text(fs, "initrd", "i", "INITRD", def.Initrd, "path of an initrd, u-root or none", func(c *config.Config, s string) error { c.Initrd = s; return nil })
	f.text(fs, "cmdline", "", "TEXT", "", "kernel command line instead of ditto's own", func(c *config.Config, s string) error { c.Cmdline.Replace = s; return nil })
	f.text(fs, "append", "a", "TEXT", "", "words to add to the kernel command line", func(c *config.Config, s string) error {
		c.Cmdline.Append = strings.TrimSpace(c.Cmdline.Append + " " + s)
		return nil
	})
	f.list(fs, "disk", "", "DISK", "a disk, as below; repeat for more", setDisks)
	f.list(fs, "net", "", "NET", "a network, as below; repeat for more; default user", setNets)
	f.list(fs, "forward", "p", "FORWARD", "a host port that leads into the guest, as below; repeat for more", addForwards)
	f.text(fs, "rng", "", "SWITCH", def.RNG.String(), "give the guest entropy: on or off", func(c *config.Config, s string) error { return c.RNG.UnmarshalText([]byte(s)) })
	f.text(fs, "balloon", "", "SIZE", "0", "memory to take from the guest at start, or off for no balloon", setBalloon)
	f.text(fs, "console", "", "KIND", def.Console.String(), "the device behind the console: serial or virtio", func(c *config.Config, s string) error { return c.Console.UnmarshalText([]byte(s)) })
	f.text(fs, "sandbox", "", "SWITCH", def.Sandbox.String(), "drop rights before the guest runs: on or off", func(c *config.Config, s string) error { return c.Sandbox.UnmarshalText([]byte(s)) })
	f.text(fs, "on-reboot", "", "POLICY", def.OnReboot.String(), "what a reboot of the guest does: restart or stop", func(c *config.Config, s string) error { return c.OnReboot.UnmarshalText([]byte(s)) })
	f.integer(fs, "reboot-limit", "", def.RebootLimit, "end after so many reboots, 0 for no limit", func(c *config.Config, n int) { c.RebootLimit = n })

	complete := func(name string, words ...string) {
		_ = cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
	}
	complete("hugepages", "thp", "2M", "1G", "off")
	complete("tracker", config.TrackerNames()...)
	complete("names", "on", "off")
	complete("console", "serial", "virtio")
	complete("rng", "on", "off")
	complete("sandbox", "on", "off")
	complete("on-reboot", "restart", "stop")
	complete("log-level", "debug", "info", "warn", "error")
}

// apply changes c by the flags that were given.
func (f *runFlags) apply(fs *pflag.FlagSet, c *config.Config) error {
	for _, change := range f.changes {
		if !fs.Changed(change.flag) {
			continue
		}
		if err := change.apply(c); err != nil {
			return fmt.Errorf("--%s: %w", change.flag, err)
		}
	}
	folder, err := os.Getwd()
	if err != nil {
		return err
	}
	c.ResolvePaths(folder)
	return nil
}

// funcValue is a flag that hands its text to a function at once, so that a
// mistake is reported with the flag's name.
type funcValue struct {
	kind, text string
	check      func(string) error
}

func (v *funcValue) Set(s string) error { v.text = s; return v.check(s) }
func (v *funcValue) String() string     { return v.text }
func (v *funcValue) Type() string       { return v.kind }

// text defines a flag that changes the configuration by its text.
func (f *runFlags) text(fs *pflag.FlagSet, name, short, kind, def, usage string, set func(*config.Config, string) error) {
	v := &funcValue{kind: kind, text: def, check: func(s string) error {
		scratch := config.Default()
		return set(&scratch, s)
	}}
	fs.VarP(v, name, short, usage)
	f.changes = append(f.changes, change{name, func(c *config.Config) error { return set(c, v.text) }})
}

func (f *runFlags) integer(fs *pflag.FlagSet, name, short string, def int, usage string, set func(*config.Config, int)) {
	v := fs.IntP(name, short, def, usage)
	f.changes = append(f.changes, change{name, func(c *config.Config) error { set(c, *v); return nil }})
}

// listValue collects the texts of a flag that may be repeated.
type listValue struct {
	kind  string
	texts []string
	check func([]string) error
}

func (v *listValue) Set(s string) error {
	if err := v.check([]string{s}); err != nil {
		return err
	}
	v.texts = append(v.texts, s)
	return nil
}
func (v *listValue) String() string { return strings.Join(v.texts, " ") }
func (v *listValue) Type() string   { return v.kind }

func (f *runFlags) list(fs *pflag.FlagSet, name, short, kind, usage string, set func(*config.Config, []string) error) {
	v := &listValue{kind: kind, check: func(texts []string) error {
		scratch := config.Default()
		return set(&scratch, texts)
	}}
	fs.VarP(v, name, short, usage)
	f.changes = append(f.changes, change{name, func(c *config.Config) error { return set(c, v.texts) }})
}

func setCPU(c *config.Config, s string) error {
	if s == "" {
		return errors.New("use host, baseline or the path of a file that 'ditto cpu -o' wrote")
	}
	c.CPU = s
	return nil
}

func setMemory(c *config.Config, s string) error {
	for _, item := range strings.Split(s, ",") {
		if c.Memory.Backing.UnmarshalText([]byte(item)) == nil {
			continue
		}
		size, err := config.ParseBytes(item)
		if err != nil {
			return err
		}
		c.Memory.Size = size
	}
	return nil
}

func setBalloon(c *config.Config, s string) error {
	if s == "off" {
		c.Balloon.Enabled, c.Balloon.Size = false, 0
		return nil
	}
	size, err := config.ParseBytes(s)
	c.Balloon.Enabled, c.Balloon.Size = true, size
	return err
}

func setDisks(c *config.Config, texts []string) error {
	c.Disks = nil
	for _, text := range texts {
		d, err := config.ParseDisk(text)
		if err != nil {
			return err
		}
		c.Disks = append(c.Disks, d)
	}
	return nil
}

func setNets(c *config.Config, texts []string) error {
	nets := make([]config.Net, 0, len(texts))
	for _, text := range texts {
		n, err := config.ParseNet(text)
		if err != nil {
			return err
		}
		nets = append(nets, n)
	}
	c.SetNets(nets)
	return nil
}

// addForwards leads host ports into the guest through its first user-mode
// network.
func addForwards(c *config.Config, texts []string) error {
	for i := range c.Nets {
		if c.Nets[i].Mode != config.NetUser {
			continue
		}
		for _, text := range texts {
			var f config.Forward
			if err := f.UnmarshalText([]byte(text)); err != nil {
				return err
			}
			c.Nets[i].Forwards = append(c.Nets[i].Forwards, f)
		}
		return nil
	}
	return errors.New("there is no user-mode network to forward by: add --net user")
}
