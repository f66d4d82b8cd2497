package config

import (
	"fmt"
	"slices"
	"strings"

	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/memory"
)

// Error is a mistake in a configuration.
type Error struct {
	Field   string // as in the file: disks[0].cache
	Value   string // what was given
	Problem string // what is wrong with it
	Cure    string // what to do instead
}

// Error returns one line: field, value, problem and cure.
func (e *Error) Error() string {
	s := fmt.Sprintf("%s: %q: %s", e.Field, e.Value, e.Problem)
	if e.Cure != "" {
		s += ": " + e.Cure
	}
	return s
}

// ValidName reports whether name can be a machine's name: letters, digits, dot,
// dash and underscore, starting with a letter or a digit.
func ValidName(name string) bool {
	if name == "" || len(name) > MaxNameBytes {
		return false
	}
	for i, c := range []byte(name) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case i > 0 && (c == '-' || c == '_' || c == '.'):
		default:
			return false
		}
	}
	return true
}

// Validate looks for the first mistake. It opens nothing: what a path or a
// device name leads to is found out when the machine is built.
func (c *Config) Validate() error {
	checks := []func(*Config) error{
		checkName, checkCPUs, checkMemory, checkBoot, checkCommand,
		checkDisks, checkNets, checkBalloon, checkDevices, checkPolicies,
	}
	for _, check := range checks {
		if err := check(c); err != nil {
			return err
		}
	}
	return nil
}

func checkName(c *Config) error {
	if c.Name != "" && !ValidName(c.Name) {
		return &Error{"name", c.Name, "not a usable name",
			fmt.Sprintf("use up to %d letters, digits, dots, dashes and underscores, a letter or digit first", MaxNameBytes)}
	}
	return nil
}

func checkCPUs(c *Config) error {
	if c.CPUs < 1 || c.CPUs > MaxCPUs {
		return &Error{"cpus", fmt.Sprint(c.CPUs), "out of range", fmt.Sprintf("use 1 to %d", MaxCPUs)}
	}
	return nil
}

func checkMemory(c *Config) error {
	size := uint64(c.Memory.Size)
	if _, err := memory.Layout(size); err != nil {
		return &Error{"memory.size", c.Memory.Size.String(), "not a usable size",
			fmt.Sprintf("use a multiple of 4K from %s to %s", Bytes(memory.MinSize), Bytes(memory.MaxSize))}
	}
	if err := checkTracker(c); err != nil {
		return err
	}
	var frame uint64
	switch c.Memory.HugePages {
	case memory.HugePagesTHP, memory.HugePagesOff:
		return nil
	case memory.HugePages2M:
		frame = memory.LargeFrameSize
	case memory.HugePages1G:
		frame = memory.HugeFrameSize
	default:
		return &Error{"memory.hugepages", c.Memory.HugePages.String(), "unknown", "use thp, 2M, 1G or off"}
	}
	if size%frame != 0 {
		return &Error{"memory.size", c.Memory.Size.String(), fmt.Sprintf("not a multiple of the %s huge pages asked for", c.Memory.HugePages),
			"change the size, or use --hugepages thp"}
	}
	return nil
}

func checkTracker(c *Config) error {
	kind := c.Memory.Tracker
	switch {
	case kind < memory.TrackerAuto || kind > memory.TrackerNone:
		return &Error{"memory.tracker", kind.String(), "unknown", "use " + orList(TrackerNames())}
	case kind == memory.TrackerWPAsync && c.Memory.Backing != memory.Anonymous:
		return &Error{"memory.tracker", kind.String(), fmt.Sprintf("cannot follow %s memory, which other processes write", c.Memory.Backing),
			"use kvm-log or auto, or leave the memory anonymous"}
	}
	return nil
}

func checkBoot(c *Config) error {
	if c.Initrd == "" {
		return &Error{"initrd", "", "empty", "give a path, u-root or none"}
	}
	for field, line := range map[string]string{"cmdline.replace": c.Cmdline.Replace, "cmdline.append": c.Cmdline.Append} {
		if len(line) > MaxCommandLineBytes {
			return &Error{field, line[:32] + "...", fmt.Sprintf("%d bytes long", len(line)), fmt.Sprintf("Linux takes %d", MaxCommandLineBytes)}
		}
		if i := strings.IndexFunc(line, func(r rune) bool { return r < ' ' || r == 0x7f }); i >= 0 {
			return &Error{field, line, fmt.Sprintf("holds a control character at byte %d", i), "write it in one line of text"}
		}
	}
	return nil
}

func checkCommand(c *Config) error {
	if len(c.Command) == 0 {
		return nil
	}
	if c.Initrd != InitrdURoot {
		return &Error{"command", c.Command[0], fmt.Sprintf("only ditto's own init runs a command, and initrd is %q", c.Initrd),
			"leave out --initrd, or pass the command to that init with --append"}
	}
	total := 0
	for _, arg := range c.Command {
		total += len(arg) + 1
		if strings.ContainsRune(arg, 0) {
			return &Error{"command", arg, "holds a NUL byte", "arguments are text"}
		}
	}
	if total > MaxCommandBytes {
		return &Error{"command", c.Command[0], fmt.Sprintf("%d bytes long with its arguments", total), "put it in a script on a disk"}
	}
	if c.Command[0] == "" {
		return &Error{"command", "", "empty", "name the program to run after --"}
	}
	return nil
}

func checkDisks(c *Config) error {
	seen := map[string]int{}
	for i, d := range c.Disks {
		field := fmt.Sprintf("disks[%d]", i)
		if d.Path == "" || strings.ContainsRune(d.Path, 0) {
			return &Error{field + ".path", d.Path, "not a path", "name a raw or qcow2 image, or a block device"}
		}
		if !slices.Contains([]chain.Format{chain.Probe, chain.Raw, chain.Qcow2}, d.Format) {
			return &Error{field + ".format", string(d.Format), "unknown format", "use raw or qcow2, or leave it out"}
		}
		if len(d.Serial) > MaxSerialBytes || strings.IndexFunc(d.Serial, func(r rune) bool { return r <= ' ' || r > '~' }) >= 0 {
			return &Error{field + ".serial", d.Serial, "not a serial number", fmt.Sprintf("use up to %d printable ASCII characters without spaces", MaxSerialBytes)}
		}
		if d.Cache < disk.CacheWriteback || d.Cache > disk.CacheWritethrough {
			return &Error{field + ".cache", d.Cache.String(), "unknown cache mode", "use writeback, none or writethrough"}
		}
		if d.Queues < 0 || d.Queues > MaxQueues {
			return &Error{field + ".queues", fmt.Sprint(d.Queues), "out of range", fmt.Sprintf("use 1 to %d, or leave it out", MaxQueues)}
		}
		if j, dup := seen[d.Path]; dup && (!d.ReadOnly || !c.Disks[j].ReadOnly) {
			return &Error{field + ".path", d.Path, fmt.Sprintf("is disks[%d] already", j), "two disks share an image only if both are read-only"}
		}
		seen[d.Path] = i
	}
	return nil
}

func checkDevices(c *Config) error {
	if n := c.Devices(); n > MaxDevices {
		return &Error{"disks and nets", fmt.Sprint(n), "more devices than the bus has slots", fmt.Sprintf("use at most %d devices", MaxDevices)}
	}
	return nil
}

func checkBalloon(c *Config) error {
	b := c.Balloon
	switch {
	case b.Size > c.Memory.Size:
		return &Error{"balloon.size", b.Size.String(), "more than the guest's memory", "use less than " + c.Memory.Size.String()}
	case b.Size%memory.PageSize != 0:
		return &Error{"balloon.size", b.Size.String(), "not a multiple of a page", "use a multiple of 4K"}
	case b.Size > 0 && !bool(b.Enabled):
		return &Error{"balloon.size", b.Size.String(), "the balloon is off", "switch it on, or leave out the size"}
	case b.StatsInterval < 0:
		return &Error{"balloon.stats-interval", b.StatsInterval.String(), "negative", "use a duration such as 10s, or 0s for never"}
	}
	return nil
}

func checkPolicies(c *Config) error {
	switch {
	case c.Console != ConsoleSerial && c.Console != ConsoleVirtio:
		return &Error{"console", c.Console.String(), "unknown console", "use " + orList(consoleNames())}
	case c.OnReboot != RebootRestart && c.OnReboot != RebootStop:
		return &Error{"on-reboot", c.OnReboot.String(), "unknown policy", "use " + orList(rebootNames())}
	case c.RebootLimit < 0:
		return &Error{"reboot-limit", fmt.Sprint(c.RebootLimit), "negative", "use 0 for no limit"}
	}
	return nil
}
