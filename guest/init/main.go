package main

import (
	"fmt"
	"os"
	"os/signal"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	switch name := path.Base(os.Args[0]); name {
	case "modprobe":
		os.Exit(modprobe(os.Args[1:]))
	case "poweroff", "reboot", "halt", "shutdown":
		os.Exit(controlCommand(name, os.Args[1:]))
	case "boot":
		os.Exit(bootCommand(os.Args[1:]))
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "ditto-init: this is process 1 of a guest; run it as /init of an initramfs")
		os.Exit(2)
	}
	log := &logger{w: os.Stdout}
	log.printf("start uptime=%.6f kernel=%s", uptime(), kernelRelease())
	boot(log)
}

// boot is the life of process 1. It never returns while the machine runs:
// the kernel panics when process 1 ends.
func boot(log *logger) {
	hadConsole := isConsole(1)
	errs := mountBase(baseMounts())
	linkStdStreams()
	line, _ := os.ReadFile("/proc/cmdline")
	cfg := parseConfig(string(line))
	loaded, more := loadModules(cfg, splitCmdline(string(line)))
	errs = append(errs, more...)
	if !hadConsole && reopenConsole() == nil {
		log.printf("start uptime=%.6f kernel=%s (late console)", uptime(), kernelRelease())
	}
	log.warnAll(errs)
	for _, c := range cfg.complaints {
		log.printf("warning: kernel command line: %s", c)
	}
	if cfg.root.source != "" {
		enterRoot(log, cfg.root)
	}
	serve(log, cfg, loaded)
}

func loadModules(cfg config, words []word) (loaded int, errs []error) {
	l, err := newLoader("/lib/modules", kernelRelease(), words)
	if err != nil {
		errs = append(errs, err)
	}
	always, _ := os.ReadFile(path.Join(l.index.dir, "ditto.load"))
	for _, name := range append(strings.Fields(string(always)), cfg.modules...) {
		if _, err := l.load(name); err != nil {
			errs = append(errs, err)
		}
	}
	errs = append(errs, l.coldplug("/sys")...)
	return l.loaded, errs
}

// enterRoot becomes the init of the root file system. When that fails the
// guest goes on with its own shell, so that someone can look.
func enterRoot(log *logger, spec rootSpec) {
	err := mountNewRoot(spec)
	if err == nil {
		log.printf("root source=%s init=%s uptime=%.6f", spec.source, spec.init, uptime())
		err = switchRoot(spec)
	}
	log.printf("error: %v", err)
}

// serve runs the command or the shell until something ends the machine.
func serve(log *logger, cfg config, loaded int) {
	r := newReaper()
	go r.run(nil)
	prepareHost(log, cfg)

	pressed := make(chan struct{}, 1)
	_, errs := watchButtons("/sys", "/dev", pressed)
	signals := make(chan os.Signal, 4)
	for sig := range controlSignals() {
		signal.Notify(signals, sig)
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF)
	go keepTime(log)

	disks, diskErrs := mountDisks(cfg)
	log.warnAll(append(errs, diskErrs...))
	nets, netDone := bringUpNetwork(r, log, cfg)
	log.printf("ready uptime=%.6f modules=%d disks=%d nets=%d", uptime(), loaded, disks, nets)

	stop := make(chan struct{})
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		work(r, log, cfg, netDone, stop)
	}()

	act, reason := cfg.after, "command ended"
	select {
	case <-finished:
	case <-pressed:
		act, reason = actPowerOff, "power button"
	case sig := <-signals:
		act, reason = controlSignals()[sig], "requested"
	}
	close(stop)
	shutDown(log, act, reason, cfg.stopGrace)
	select {} // the kernel refused, or halts
}

// work runs the wanted command, then perhaps a shell. It returns when the
// machine should end.
func work(r *reaper, log *logger, cfg config, netDone, stop <-chan struct{}) {
	shell, err := findShell(cfg)
	if err != nil {
		log.printf("error: %v", err)
		return
	}
	c := &console{reaper: r, tty: activeConsole("/sys"), size: cfg.winsize, term: cfg.term, shell: shell}
	if command := wantedCommand(cfg); command != "" {
		select {
		case <-netDone:
		case <-time.After(cfg.netWait):
			log.printf("warning: the network is not up after %s", cfg.netWait)
		}
		done, err := c.runCommand(log, command)
		if err != nil {
			log.printf("exit status=127 seconds=0")
			log.printf("error: %v", err)
		} else {
			<-done
		}
		if cfg.after != actShell {
			return
		}
	}
	c.keepShell(log, stop)
}

// prepareHost sets what programs expect to find: a name, a home, /etc files.
func prepareHost(log *logger, cfg config) {
	if err := unix.Sethostname([]byte(cfg.hostname)); err != nil {
		log.printf("warning: host name: %v", err)
	}
	for _, dir := range []string{"/root", "/etc", mountRoot} {
		_ = os.MkdirAll(dir, 0o755)
	}
	writeIfMissing("/etc/hosts", "127.0.0.1 localhost "+cfg.hostname+"\n::1 localhost\n")
	writeIfMissing("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
	writeIfMissing("/etc/group", "root:x:0:\ntty:x:5:\n")
}

func writeIfMissing(name, text string) {
	if _, err := os.Lstat(name); err != nil {
		_ = os.WriteFile(name, []byte(text), 0o644)
	}
}
