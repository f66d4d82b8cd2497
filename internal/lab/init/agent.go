package main

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/lab/wire"
)

// runAgent serves every port until the machine is switched off.
func runAgent() error {
	var hello wire.Hello
	if err := json.Unmarshal([]byte(os.Getenv(errorsEnv)), &hello.Errors); err != nil {
		return fmt.Errorf("%s: %w", errorsEnv, err)
	}
	if err := stayAwake(); err != nil {
		return err
	}
	ports, err := findPorts(wire.PortPrefix)
	if err != nil {
		return err
	}
	if len(ports) == 0 {
		return fmt.Errorf("no virtio-serial port is called %s*", wire.PortPrefix)
	}
	var wg sync.WaitGroup
	for _, path := range ports {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		wg.Go(func() {
			defer func() { _ = f.Close() }()
			p := &port{conn: wire.NewConn(f), cgroup: "/sys/fs/cgroup/" + filepath.Base(path)}
			fmt.Fprintf(os.Stderr, "lab agent: %s: %v\n", path, p.serve(hello))
		})
	}
	wg.Wait()
	return nil
}

// findPorts returns the devices of the ports whose names begin so.
func findPorts(prefix string) ([]string, error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	sort.Strings(names)
	var ports []string
	for _, path := range names {
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(string(b), prefix) {
			ports = append(ports, filepath.Join("/dev", filepath.Base(filepath.Dir(path))))
		}
	}
	return ports, nil
}

// port runs one command after another for the host.
type port struct {
	conn   *wire.Conn
	cgroup string // folder that holds the processes of the running command
	cur    *process
}

// serve reads frames until the stream fails, and says how.
func (p *port) serve(hello wire.Hello) error {
	if err := p.conn.WriteJSON(wire.Ready, 0, hello); err != nil {
		return err
	}
	for {
		f, err := p.conn.Read()
		if err != nil {
			return err
		}
		if err := p.handle(f); err != nil {
			return err
		}
	}
}

func (p *port) handle(f wire.Frame) error {
	if f.Type == wire.PowerOff {
		powerOff()
	}
	if f.Type == wire.Start {
		return p.start(f)
	}
	if p.cur == nil || p.cur.run != f.Run {
		return nil // of a run that has ended
	}
	switch f.Type {
	case wire.Stdin:
		return p.cur.putStdin(f.Payload)
	case wire.StdinEOF:
		p.cur.closeStdin()
	case wire.Signal:
		if len(f.Payload) == 4 {
			p.cur.signal(unix.Signal(binary.LittleEndian.Uint32(f.Payload)))
		}
	case wire.Resize:
		if len(f.Payload) == 4 {
			p.cur.resize(binary.LittleEndian.Uint16(f.Payload), binary.LittleEndian.Uint16(f.Payload[2:]))
		}
	default:
		return fmt.Errorf("frame of type %d from the host", f.Type)
	}
	return nil
}

// start begins a command. That the one before has ended is the host's duty: it
// uses the port again only after the Exit frame.
func (p *port) start(f wire.Frame) error {
	var cmd wire.Command
	if err := json.Unmarshal(f.Payload, &cmd); err != nil {
		return fmt.Errorf("start frame: %w", err)
	}
	if p.cur != nil {
		p.cur.closeStdin()
	}
	proc, err := startProcess(p.conn, f.Run, cmd, p.cgroup)
	if err != nil {
		p.cur = nil
		return p.conn.WriteJSON(wire.Exit, f.Run, wire.Result{Error: err.Error()})
	}
	p.cur = proc
	return nil
}

// powerOff unmounts what lies on disks, so that they are clean, and ends the
// machine.
func powerOff() {
	mounts, err := os.ReadFile("/proc/mounts")
	if err == nil {
		for line := range strings.Lines(string(mounts)) {
			f := strings.Fields(line)
			if len(f) > 2 && strings.HasPrefix(f[0], "/dev/vd") && unix.Unmount(f[1], 0) != nil {
				_ = unix.Mount("", f[1], "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
			}
		}
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}
