package config

import (
	"fmt"
	"strconv"
	"strings"

	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
)

// Disk is one virtio block device.
type Disk struct {
	// Path is a raw or qcow2 image, or a block device.
	Path string `json:"path"`
	// Format is how the disk is stored, found by its content if empty.
	Format chain.Format `json:"format,omitempty"`
	// ReadOnly opens the image for reading and tells the guest so.
	ReadOnly bool `json:"readonly,omitempty"`
	// Serial is what the guest reads as the disk's serial number, at most
	// [MaxSerialBytes] printable ASCII characters.
	Serial string     `json:"serial,omitempty"`
	Cache  disk.Cache `json:"cache"`
	// Queues is the number of request queues, 0 for one a vCPU up to 4.
	Queues int `json:"queues,omitempty"`
}

// QueueCount returns the queues the disk gets in a machine with cpus vCPUs.
func (d Disk) QueueCount(cpus int) int {
	if d.Queues > 0 {
		return d.Queues
	}
	return max(1, min(cpus, 4))
}

// ParseDisk reads the value of --disk: PATH[,format=F][,readonly][,serial=S]
// [,cache=MODE][,queues=N]. A comma in the path is written twice.
func ParseDisk(value string) (Disk, error) {
	var d Disk
	for i, item := range splitOptions(value) {
		key, arg, hasArg := strings.Cut(item, "=")
		if i == 0 && (!hasArg || key != "path") {
			d.Path = item
			continue
		}
		var err error
		switch key {
		case "path":
			d.Path = arg
		case "readonly", "ro":
			d.ReadOnly = true
			if hasArg {
				err = (*OnOff)(&d.ReadOnly).UnmarshalText([]byte(arg))
			}
		case "format":
			d.Format = chain.Format(arg)
		case "serial":
			d.Serial = arg
		case "cache":
			err = d.Cache.UnmarshalText([]byte(arg))
		case "queues":
			d.Queues, err = strconv.Atoi(arg)
			if err != nil {
				err = fmt.Errorf("%q is not a number", arg)
			}
		default:
			err = fmt.Errorf("unknown option: use format=, readonly, serial=, cache= or queues=, and write a comma of the path twice")
		}
		if err != nil {
			return Disk{}, fmt.Errorf("disk %q: %s: %w", value, key, err)
		}
	}
	if d.Path == "" {
		return Disk{}, fmt.Errorf("disk %q: no path: write --disk PATH[,readonly][,cache=none]", value)
	}
	return d, nil
}

// splitOptions splits at single commas; two commas stand for one in an item.
func splitOptions(value string) []string {
	const comma = "\x00"
	items := strings.Split(strings.ReplaceAll(value, ",,", comma), ",")
	for i := range items {
		items[i] = strings.ReplaceAll(items[i], comma, ",")
	}
	return items
}
