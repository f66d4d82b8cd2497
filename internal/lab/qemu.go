package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/lab/wire"
)

// firstFD is the descriptor that the first of cmd.ExtraFiles becomes.
const firstFD = 3

// machine is a running QEMU.
type machine struct {
	proc *os.Process
	done chan struct{} // closed when QEMU has ended
	err  error         // why, once done is closed
}

// qemuArgs is the command line of the recipe. The streams are those for commands,
// and then that of ticks.
func qemuArgs(o Options, k, initrd, scratch, share, log string, ports int) []string {
	args := []string{
		"-name", "ditto-lab", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-machine", "pc,usb=off,vmport=off,hpet=off",
		"-accel", "tcg,thread=multi,tb-size=512",
		"-cpu", "EPYC,+svm,+npt",
		"-smp", strconv.Itoa(o.CPUs),
		"-m", strconv.Itoa(o.MemoryMiB),
		"-kernel", k, "-initrd", initrd,
		"-append", strings.TrimSpace("console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable " +
			"random.trust_cpu=on cryptomgr.notests apparmor=0 initcall_blacklist=jent_mod_init,bpf_tcp_ca_kfunc_init " + o.Append),
		"-chardev", "file,id=log,path=" + escape(log), "-serial", "chardev:log",
		"-virtfs", "local,path=/,mount_tag=" + wire.HostTag + ",security_model=none,readonly=on,multidevs=remap",
		"-virtfs", "local,path=" + escape(share) + ",mount_tag=" + wire.ShareTag + ",security_model=none,multidevs=remap",
		"-device", fmt.Sprintf("virtio-serial-pci,max_ports=%d", ports+2),
	}
	args = append(args, driveArgs(scratch, wire.ScratchSerial)...)
	for i, disk := range o.Disks {
		args = append(args, driveArgs(disk, wire.DiskSerial+strconv.Itoa(i))...)
	}
	for i := range ports {
		args = append(args, portArgs(fmt.Sprintf("run%d", i), wire.PortPrefix+strconv.Itoa(i), firstFD+i)...)
	}
	args = append(args, portArgs("tick", wire.TickPort, firstFD+ports)...)
	return append(args, o.QEMUArgs...)
}

// portArgs make a virtio-serial port of a socket that QEMU inherits.
func portArgs(id, name string, fd int) []string {
	return []string{
		"-chardev", fmt.Sprintf("socket,id=%s,fd=%d", id, fd),
		"-device", fmt.Sprintf("virtserialport,chardev=%s,name=%s", id, name),
	}
}

func driveArgs(path, serial string) []string {
	return []string{
		"-drive", "if=none,format=raw,cache=writeback,discard=unmap,id=" + serial + ",file=" + escape(path),
		"-device", "virtio-blk-pci,drive=" + serial + ",serial=" + serial,
	}
}

// escape doubles commas, which separate QEMU's suboptions.
func escape(path string) string { return strings.ReplaceAll(path, ",", ",,") }

// startQEMU starts QEMU with ports connected streams.
func startQEMU(args []string, ports int) (*machine, []net.Conn, error) {
	path, err := lookTool("qemu-system-x86_64")
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.Command(path, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	// Its own process group keeps a terminal's Ctrl-C from it: commands end
	// first. It dies with us whatever kills us.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}

	var conns []net.Conn
	fail := func(err error) (*machine, []net.Conn, error) {
		closeAll(conns)
		for _, f := range cmd.ExtraFiles {
			_ = f.Close()
		}
		return nil, nil, err
	}
	for range ports {
		conn, theirs, err := socketPair()
		if err != nil {
			return fail(err)
		}
		conns, cmd.ExtraFiles = append(conns, conn), append(cmd.ExtraFiles, theirs)
	}
	m := &machine{done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		// The death signal is sent when the starting thread ends, so it must
		// live as long as QEMU.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		m.err = qemuError(cmd.Wait(), stderr.String())
		close(m.done)
	}()
	if err := <-started; err != nil {
		return fail(fmt.Errorf("lab: start QEMU: %w", err))
	}
	m.proc = cmd.Process
	for _, f := range cmd.ExtraFiles {
		_ = f.Close()
	}
	return m, conns, nil
}

func qemuError(err error, stderr string) error {
	if err == nil {
		return errors.New("the lab switched itself off")
	}
	if msg := strings.TrimSpace(stderr); msg != "" {
		return fmt.Errorf("QEMU: %w: %s", err, msg)
	}
	return fmt.Errorf("QEMU: %w", err)
}

// kill ends QEMU at once and waits for it.
func (m *machine) kill() {
	_ = m.proc.Kill()
	<-m.done
}

// wait waits for QEMU to end by itself until ctx ends, and tells whether it did.
func (m *machine) wait(ctx context.Context) bool {
	select {
	case <-m.done:
		return true
	case <-ctx.Done():
		return false
	}
}

// socketPair returns two ends of a stream, one of them as a file to inherit.
func socketPair() (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("lab: socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "lab"), os.NewFile(uintptr(fds[1]), "qemu")
	defer func() { _ = ours.Close() }() // FileConn works on a duplicate
	conn, err := net.FileConn(ours)
	if err != nil {
		_ = theirs.Close()
		return nil, nil, fmt.Errorf("lab: socketpair: %w", err)
	}
	return conn, theirs, nil
}

func closeAll(conns []net.Conn) {
	for _, c := range conns {
		_ = c.Close()
	}
}
