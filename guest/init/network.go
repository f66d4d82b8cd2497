package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// ethernets lists the Ethernet interfaces of a sysfs in index order: those
// with a device behind them, so neither lo nor tunnels.
func ethernets(sysfs string) []string {
	entries, err := os.ReadDir(filepath.Join(sysfs, "class/net"))
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		dir := filepath.Join(sysfs, "class/net", e.Name())
		kind, err := os.ReadFile(filepath.Join(dir, "type"))
		if err != nil || strings.TrimSpace(string(kind)) != strconv.Itoa(unix.ARPHRD_ETHER) {
			continue
		}
		if _, err := os.Stat(filepath.Join(dir, "device")); err == nil {
			names = append(names, e.Name())
		}
	}
	return names
}

func ifIndex(sysfs, name string) (int, error) {
	b, err := os.ReadFile(filepath.Join(sysfs, "class/net", name, "ifindex"))
	if err != nil {
		return 0, fmt.Errorf("no interface %s", name)
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// planNetwork gives each interface its specification. DHCP everywhere is what
// an interface gets that no word names; a static address without an interface
// is the first one's.
func planNetwork(ifaces []string, specs []netSpec) map[string]netSpec {
	plan := map[string]netSpec{}
	for _, name := range ifaces {
		plan[name] = netSpec{iface: name, mode: netDHCP}
	}
	for _, s := range specs {
		switch {
		case s.iface != "":
			plan[s.iface] = s
		case s.mode == netStatic && len(ifaces) > 0:
			plan[ifaces[0]] = s
		case s.mode != netStatic:
			for _, name := range ifaces {
				plan[name] = s
			}
		}
	}
	return plan
}

// bringUpNetwork configures every interface and closes done when each has an
// address or has failed. DHCP clients run side by side.
func bringUpNetwork(r *reaper, log *logger, c config) (started int, done <-chan struct{}) {
	ch := make(chan struct{})
	if err := setLinkUp("lo"); err != nil {
		log.printf("warning: lo: %v", err)
	}
	plan := planNetwork(ethernets("/sys"), c.nets)
	var dns []netip.Addr
	var waits []<-chan syscall.WaitStatus
	var names []string
	for name, s := range plan {
		switch s.mode {
		case netStatic:
			if err := setStatic(name, s); err != nil {
				log.printf("warning: %s: %v", name, err)
				continue
			}
			dns = append(dns, s.dns...)
			started++
		case netDHCP:
			wait, err := startDHCP(r, name)
			if err != nil {
				log.printf("warning: %s: %v", name, err)
				continue
			}
			waits, names = append(waits, wait), append(names, name)
			started++
		}
	}
	if len(dns) > 0 {
		if err := os.WriteFile("/etc/resolv.conf", resolvConf(dns), 0o644); err != nil {
			log.printf("warning: %v", err)
		}
	}
	go func() {
		defer close(ch)
		for i, w := range waits {
			if ws := <-w; exitCode(ws) != 0 {
				log.printf("warning: %s: no DHCP lease, see %s", names[i], dhcpLog(names[i]))
			}
		}
	}()
	return started, ch
}

func setLinkUp(name string) error {
	idx, err := ifIndex("/sys", name)
	if err != nil {
		return err
	}
	return netlinkDo(linkUpRequest(idx))
}

func setStatic(name string, s netSpec) error {
	idx, err := ifIndex("/sys", name)
	if err != nil {
		return err
	}
	if err := netlinkDo(addrRequest(idx, s.addr)); err != nil {
		return fmt.Errorf("address %s: %w", s.addr, err)
	}
	if err := netlinkDo(linkUpRequest(idx)); err != nil {
		return fmt.Errorf("link up: %w", err)
	}
	if !s.gateway.IsValid() {
		return nil
	}
	if err := netlinkDo(defaultRouteRequest(idx, s.gateway)); err != nil {
		return fmt.Errorf("route via %s: %w", s.gateway, err)
	}
	return nil
}

func resolvConf(dns []netip.Addr) []byte {
	var b strings.Builder
	for _, ip := range dns {
		b.WriteString("nameserver " + ip.String() + "\n")
	}
	return []byte(b.String())
}

func dhcpLog(name string) string { return "/run/dhclient." + name + ".log" }

// startDHCP runs u-root's dhclient (or busybox's udhcpc) on one interface.
func startDHCP(r *reaper, name string) (<-chan syscall.WaitStatus, error) {
	if _, err := ifIndex("/sys", name); err != nil {
		return nil, err
	}
	out, err := os.OpenFile(dhcpLog(name), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	argv := []string{"dhclient", "-ipv6=false", "-timeout", "5", "-retry", "4", "^" + name + "$"}
	prog, err := lookPath("dhclient")
	if err != nil {
		argv = []string{"udhcpc", "-n", "-q", "-f", "-i", name}
		if prog, err = lookPath("udhcpc"); err != nil {
			return nil, errors.New("the image has no DHCP client (dhclient or udhcpc)")
		}
	}
	fds := []uintptr{null.Fd(), out.Fd(), out.Fd()}
	_, wait, err := r.start(prog, argv, &syscall.ProcAttr{Dir: "/", Env: environment(""), Files: fds})
	return wait, err
}
