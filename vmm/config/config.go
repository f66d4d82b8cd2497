package config

import "ditto.vm/memory"

// Limits that [Config.Validate] enforces.
const (
	// MaxCPUs is what the interrupt controller's tables are laid out for.
	MaxCPUs = 64
	// MaxDevices is the number of PCI slots besides the host bridge.
	MaxDevices = 31
	// MaxQueues bounds the queues of one disk; each costs a worker and an
	// interrupt.
	MaxQueues = 16
	// MaxSerialBytes is VIRTIO_BLK_ID_BYTES (virtio 1.2 5.2.6).
	MaxSerialBytes = 20
	// MaxNameBytes keeps a name usable as a file, host and socket name.
	MaxNameBytes = 48
	// MaxCommandLineBytes is COMMAND_LINE_SIZE of Linux on x86 less the NUL.
	MaxCommandLineBytes = 2047
	// MaxCommandBytes bounds the command that the guest is to run.
	MaxCommandBytes = 128 << 10
)

// Initrd values that are not paths.
const (
	// InitrdURoot stands for the u-root image that fits the kernel.
	InitrdURoot = "u-root"
	// InitrdNone boots without an initrd.
	InitrdNone = "none"
)

// CPU values that are not paths.
const (
	// CPUHost gives the guest all features of the host's CPU that its state can
	// hold.
	CPUHost = "host"
	// CPUBaseline gives it those of x86-64-v2.
	CPUBaseline = "baseline"
)

// Config describes one virtual machine. The zero value is not valid: start
// from [Default].
type Config struct {
	// Name is unique among the running machines of a user. Empty means that
	// the registry picks a free one.
	Name string `json:"name,omitempty"`
	// CPUs is the number of vCPUs.
	CPUs int `json:"cpus"`
	// CPU is what the guest's CPUs can do: [CPUHost], [CPUBaseline] or the path
	// of a file made by 'ditto cpu'. What is saved or migrated keeps what it was
	// started with.
	CPU    string `json:"cpu"`
	Memory Memory `json:"memory"`
	// Kernel is a path, the name of a cached kernel, or empty for the newest
	// cached one.
	Kernel string `json:"kernel,omitempty"`
	// Initrd is a path, [InitrdURoot] or [InitrdNone].
	Initrd  string  `json:"initrd"`
	Cmdline Cmdline `json:"cmdline,omitzero"`
	// Command is run by ditto's init in the guest instead of a shell; the
	// machine powers off when it ends. Empty means a shell.
	Command []string `json:"command,omitempty"`
	// Disks appear on the bus, and so in the guest, in this order.
	Disks []Disk `json:"disks,omitempty"`
	// Nets appear in this order, after the disks. Nil means the default, one
	// user-mode network; empty means none.
	Nets []Net `json:"nets"`
	// RNG adds an entropy device fed from the host's random pool.
	RNG     OnOff   `json:"rng"`
	Balloon Balloon `json:"balloon"`
	// Console is the device the guest's console is on.
	Console Console `json:"console"`
	// Sandbox drops the process's rights before the first guest instruction.
	Sandbox OnOff `json:"sandbox"`
	// OnReboot is what a reboot from inside the guest does.
	OnReboot RebootPolicy `json:"on-reboot"`
	// RebootLimit ends the machine after so many reboots. 0 means no limit.
	RebootLimit int `json:"reboot-limit,omitempty"`
}

// Memory is the guest's RAM and what backs it.
type Memory struct {
	Size      Bytes            `json:"size"`
	HugePages memory.HugePages `json:"hugepages"`
	Backing   memory.Backing   `json:"backing"`
	// Tracker is how written pages are found.
	Tracker memory.TrackerKind `json:"tracker"`
	// Names keeps, while the guest runs, which pages equal blocks of disks.
	Names OnOff `json:"names"`
}

// Cmdline changes the kernel command line.
type Cmdline struct {
	// Replace is used instead of ditto's own command line when not empty.
	Replace string `json:"replace,omitempty"`
	// Append follows at the end of either.
	Append string `json:"append,omitempty"`
}

// Balloon takes memory back from the guest.
type Balloon struct {
	// Enabled adds the device.
	Enabled OnOff `json:"enabled"`
	// Size is how much is taken from the guest at start, in bytes.
	Size Bytes `json:"size,omitempty"`
	// StatsInterval is how often the guest is asked for its memory
	// statistics. 0 means never.
	StatsInterval Duration `json:"stats-interval,omitempty"`
	// DeflateOnOOM lets a guest that is out of memory take pages back.
	DeflateOnOOM OnOff `json:"deflate-on-oom"`
	// FreePageReporting gives memory that the guest freed back to the host.
	FreePageReporting OnOff `json:"free-page-reporting"`
}

// Default returns the configuration that no flag and no file changed.
func Default() Config {
	return Config{
		CPUs:    1,
		CPU:     CPUHost,
		Memory:  Memory{Size: 512 << 20, Names: true},
		Initrd:  InitrdURoot,
		Nets:    DefaultNets(),
		RNG:     true,
		Sandbox: true,
		Balloon: Balloon{Enabled: true, DeflateOnOOM: true, FreePageReporting: true},
	}
}

// DefaultNets returns what a machine without a word about networks gets.
func DefaultNets() []Net { return []Net{{Mode: NetUser}} }

// Devices counts the PCI functions the machine has besides the host bridge.
func (c *Config) Devices() int {
	n := len(c.Disks) + len(c.Nets)
	for _, present := range []bool{bool(c.RNG), bool(c.Balloon.Enabled), c.Console == ConsoleVirtio} {
		if present {
			n++
		}
	}
	return n
}
