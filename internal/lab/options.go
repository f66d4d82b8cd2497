package lab

import (
	"errors"
	"fmt"
	"log/slog"

	"ditto.vm/images/debian"
)

// DefaultCPUs is one. With several, a CPU that translates code in QEMU's TCG
// while another patches it may keep the old translation, so that now and then
// Linux dies in the breakpoint by which it patches jump labels. Small labs side
// by side are both steadier and faster than a large one; what measures threads
// that work at the same time wants more.
const DefaultCPUs = 1

// Other defaults of [Options].
const (
	DefaultMemoryMiB = 9216 // holds a guest of 6 GiB
	DefaultDiskBytes = 64 << 30
	DefaultKernel    = "6.12" // 6.1 lacks WP_ASYNC and PAGEMAP_SCAN
	DefaultTHP       = "madvise"
)

// maxDisks leaves room for the other devices on one PCI bus.
const maxDisks = 16

// Options describe an emulated host. The zero value is a good one.
type Options struct {
	// MemoryMiB is the host's memory; 0 means DefaultMemoryMiB. What is not
	// used is not taken from this machine.
	MemoryMiB int
	// CPUs is the number of its CPUs; 0 means DefaultCPUs.
	CPUs int
	// DiskBytes is the size of the sparse scratch disk mounted on /lab; 0
	// means DefaultDiskBytes.
	DiskBytes int64
	// Kernel is a specification as images/kernel takes it; "" means
	// DefaultKernel. It must be a generic kernel.
	Kernel string
	// THP is the setting of transparent huge pages: always, madvise or never;
	// "" means DefaultTHP.
	THP string
	// Disks are paths of raw images that become /dev/lab/disk0 and so on. They
	// are the caller's, and keep what the lab had flushed when it is killed.
	Disks []string
	// Append is added to the kernel's command line.
	Append string
	// QEMUArgs are added to QEMU's command line.
	QEMUArgs []string
	// CacheDir is the cache root; "" means images/cache's.
	CacheDir string
	// Progress hears of downloads. It may be nil.
	Progress debian.Progress
	// Log may be nil.
	Log *slog.Logger
}

// withDefaults checks o and fills in what is not set.
func (o Options) withDefaults() (Options, error) {
	if o.MemoryMiB == 0 {
		o.MemoryMiB = DefaultMemoryMiB
	}
	if o.CPUs == 0 {
		o.CPUs = DefaultCPUs
	}
	if o.DiskBytes == 0 {
		o.DiskBytes = DefaultDiskBytes
	}
	if o.Kernel == "" {
		o.Kernel = DefaultKernel
	}
	if o.THP == "" {
		o.THP = DefaultTHP
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case o.MemoryMiB < 512:
		return o, fmt.Errorf("lab: %d MiB of memory, at least 512 are needed", o.MemoryMiB)
	case o.CPUs < 1 || o.CPUs > 64:
		return o, fmt.Errorf("lab: %d CPUs, 1 to 64 are possible", o.CPUs)
	case o.DiskBytes < 64<<20:
		return o, fmt.Errorf("lab: a disk of %d bytes, at least 64 MiB are needed", o.DiskBytes)
	case len(o.Disks) > maxDisks:
		return o, fmt.Errorf("lab: %d disks, at most %d are possible", len(o.Disks), maxDisks)
	case o.THP != "always" && o.THP != "madvise" && o.THP != "never":
		return o, errors.New("lab: transparent huge pages are always, madvise or never")
	}
	return o, nil
}
