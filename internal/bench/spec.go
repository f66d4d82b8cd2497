package bench

import (
	"fmt"
	"strconv"
	"strings"
)

// spec describes one virtual machine, the same for every contestant.
type spec struct {
	kernel, initrd, cmdline string
	memoryMiB, cpus         int
	disks                   []guestDisk
	tap                     string // empty: no network
}

// guestDisk is a raw image, a block device or, if it is called so, a qcow2 image.
type guestDisk struct {
	path     string
	readOnly bool
	cache    string // writeback or none
}

// dittoArgs is how a user of ditto starts g with nothing that g does not name:
// QEMU's side has no network, entropy or balloon device either.
func dittoArgs(ditto string, g spec) []string {
	args := []string{
		ditto, "run",
		"--kernel", g.kernel,
		"--memory", strconv.Itoa(g.memoryMiB) + "M",
		"--cpus", strconv.Itoa(g.cpus),
		"--rng=off", "--balloon=off",
	}
	initrd := g.initrd
	if initrd == "" {
		initrd = "none"
	}
	args = append(args, "--initrd", initrd)
	if g.cmdline != "" {
		args = append(args, "--cmdline", g.cmdline)
	}
	for _, d := range g.disks {
		value := strings.ReplaceAll(d.path, ",", ",,") + ",cache=" + d.cache
		if d.readOnly {
			value += ",readonly"
		}
		args = append(args, "--disk", value)
	}
	net := "none"
	if g.tap != "" {
		net = "tap,tap=" + g.tap
	}
	return append(args, "--net", net)
}

// A qemuMachine is a choice of QEMU's -M and of what goes with it.
type qemuMachine struct {
	name string
	args []string
}

// qemuMicroVM is -M microvm with what its documentation advises for a fast
// boot: no option ROMs, and firmware smaller than SeaBIOS. PIT, PIC, RTC and
// ACPI stay: without them Debian's kernel waits for interrupts and clocks that
// do not come, for many seconds to minutes in an emulated host.
func qemuMicroVM() qemuMachine {
	return qemuMachine{"qemu-microvm", []string{
		"-M", "microvm,x-option-roms=off,pit=on,pic=on,rtc=on,isa-serial=on,acpi=on",
		"-bios", "qboot.rom",
	}}
}

// qemuQ35 is -M q35 without what a headless guest does not need.
func qemuQ35() qemuMachine {
	return qemuMachine{"qemu-q35", []string{
		"-M", "q35,usb=off,sata=off,smbus=off,vmport=off,i8042=off,hpet=off,graphics=off",
	}}
}

// qemuArgs is how someone who knows QEMU starts g.
func qemuArgs(qemu string, machine qemuMachine, g spec) []string {
	args := append([]string{qemu}, machine.args...)
	args = append(args,
		"-accel", "kvm", "-cpu", "host",
		"-smp", strconv.Itoa(g.cpus), "-m", strconv.Itoa(g.memoryMiB),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-kernel", g.kernel,
	)
	if g.initrd != "" {
		args = append(args, "-initrd", g.initrd)
	}
	if g.cmdline != "" {
		args = append(args, "-append", g.cmdline)
	}
	for i, d := range g.disks {
		args = append(args, qemuDisk(i, d, g.cpus)...)
	}
	if g.tap != "" {
		args = append(args,
			"-netdev", "tap,id=net0,ifname="+g.tap+",script=no,downscript=no,vhost=off",
			"-device", "virtio-net-pci,netdev=net0,romfile=")
	}
	return args
}

// qemuDisk gives a disk an I/O thread and io_uring, which QEMU does not do
// unless told to, and as many queues as there are vCPUs, which it does.
func qemuDisk(i int, d guestDisk, cpus int) []string {
	id := fmt.Sprintf("disk%d", i)
	kind, direct := "file", "off"
	if strings.HasPrefix(d.path, "/dev/") {
		kind = "host_device"
	}
	if d.cache == "none" {
		direct = "on"
	}
	format := "raw"
	if strings.HasSuffix(d.path, ".qcow2") {
		format = "qcow2"
	}
	readOnly := "off"
	if d.readOnly {
		readOnly = "on"
	}
	return []string{
		"-object", "iothread,id=io-" + id,
		"-blockdev", fmt.Sprintf("driver=%s,node-name=%s,read-only=%s,cache.direct=%s,file.driver=%s,file.filename=%s,file.aio=io_uring,file.cache.direct=%s,discard=unmap",
			format, id, readOnly, direct, kind, strings.ReplaceAll(d.path, ",", ",,"), direct),
		"-device", fmt.Sprintf("virtio-blk-pci,drive=%s,num-queues=%d,iothread=io-%s", id, cpus, id),
	}
}

// shellLine joins arguments for a reader, quoting those that need it, with the
// base name of the program.
func shellLine(args []string) string {
	words := make([]string, len(args))
	for i, a := range args {
		if i == 0 {
			a = a[strings.LastIndexByte(a, '/')+1:]
		}
		if a == "" || strings.ContainsAny(a, " \t\"'$&;<>|*?()") {
			a = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
		words[i] = a
	}
	return strings.Join(words, " ")
}
