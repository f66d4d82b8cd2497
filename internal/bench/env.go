package bench

// Env is what benchmarks need from their surroundings. Empty paths stand for
// what could not be had; a benchmark that needs one of them is skipped with
// the reason in Missing.
type Env struct {
	// Ditto and QEMU are the programs to measure.
	Ditto string `json:"ditto"`
	QEMU  string `json:"qemu,omitempty"`
	// Kernel and Initrd are a Linux kernel and a u-root initramfs for it.
	Kernel string `json:"kernel,omitempty"`
	Initrd string `json:"initrd,omitempty"`
	// RootDisk is a raw ext4 image with a Debian root file system that has fio
	// and iperf3. It is opened for reading only.
	RootDisk string `json:"root_disk,omitempty"`
	// Scratch is a folder on a real file system, for test disks. It is the
	// caller's to remove.
	Scratch string `json:"scratch"`
	// Missing says, by field name, why a field is empty.
	Missing map[string]string `json:"missing,omitempty"`

	Quick bool `json:"quick"`
	// Rounds is the most that count of each benchmark, 0 for what it says itself.
	Rounds int    `json:"rounds,omitempty"`
	Commit string `json:"commit"`
	Host   Host   `json:"host"`
}

// need returns an error that skips the benchmark if a field is empty. It takes
// pairs of a name and a value.
func (e *Env) need(pairs ...string) error {
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			continue
		}
		reason := e.Missing[pairs[i]]
		if reason == "" {
			reason = "none was given"
		}
		return &Unavailable{Reason: pairs[i] + ": " + reason}
	}
	return nil
}
