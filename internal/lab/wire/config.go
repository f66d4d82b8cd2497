package wire

import "time"

// ConfigPath is where the initramfs holds the JSON [Config].
const ConfigPath = "/lab.json"

// ModulesPath is the folder of the initramfs that holds the modules to load at
// boot, decompressed; their names sort in the order in which to load them.
const ModulesPath = "/modules"

// PortPrefix begins the names of the virtio-serial ports that carry frames.
const PortPrefix = "ditto.run."

// TickPort is the name of the virtio-serial port on which a byte comes every
// [TickInterval], for the interrupt that it is: the agent throws it away. QEMU's
// TCG with SVM loses the interrupt of a halted CPU's timer once in some hours of
// CPU time, and the machine then sleeps until any other interrupt.
const TickPort = "ditto.tick"

// TickInterval bounds how long such a sleep lasts.
const TickInterval = 100 * time.Millisecond

// Tags of the 9p shares and serial numbers of the disks.
const (
	HostTag       = "host"
	ShareTag      = "share"
	ScratchSerial = "scratch"
	DiskSerial    = "disk" // followed by the number of the disk, from 0
)

// Mount points in the lab.
const (
	ScratchDir = "/lab"       // ext4 on a virtio disk that is thrown away
	ShareDir   = "/lab-share" // the host's folder for this lab, uncached
	DiskDir    = "/dev/lab"   // links to the caller's disks: disk0, disk1, ...
)

// Config tells the lab's init what to set up.
type Config struct {
	// Hostname of the lab.
	Hostname string `json:"hostname"`
	// ModulesRoot is a host path that holds <release>/ with depmod's indexes,
	// to be bound over /lib/modules.
	ModulesRoot string `json:"modulesRoot"`
	// THP is written to /sys/kernel/mm/transparent_hugepage/enabled.
	THP string `json:"thp"`
	// KVMGroup is the id of the group that owns /dev/kvm, or -1.
	KVMGroup int `json:"kvmGroup"`
}
