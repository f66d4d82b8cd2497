// Command init is process 1 of the guests that ditto builds: it turns a bare
// kernel with a u-root (or busybox) userland into a machine with modules,
// console, disks and network, runs one command or a shell, and powers off
// cleanly. It also boots a root file system when the kernel command line names
// one with root=.
//
//	kernel --> /init (this program, PID 1)
//	             |  "ditto-init: start ..."        first user-space line
//	             |  /proc /sys /dev /run ...       mounts.go
//	             |  modules by modalias            modules.go, coldplug.go
//	             |  root= given: switch_root ----> /sbin/init of that disk
//	             |  disks on /mnt/NAME             disks.go, superblock.go
//	             |  lo, DHCP or static addresses   network.go, netlink.go
//	             |  power button, signals          button.go, control.go
//	             |  wall clock after a restore     clock.go
//	             |  "ditto-init: ready ..."
//	             |  command or respawned shell     run.go
//	             |  "ditto-init: exit ..."
//	             +- TERM, KILL, sync, umount, reboot(2)   shutdown.go
//
// The same binary is /sbin/modprobe, which the kernel calls for modules it
// needs later (kernel/module/kmod.c), and /sbin/poweroff, reboot and halt,
// which ask process 1 to end the machine, and /sbin/boot, which unmounts the
// disks before u-root's boot looks for a system on them.
//
// # Kernel command line
//
// Words are split as the kernel splits them (lib/cmdline.c next_arg): double
// quotes protect blanks. A word that is wrong is reported and ignored.
//
//	ditto.run=COMMAND       run by the shell, then end the machine
//	ditto.run64=BASE64      the same, encoded (standard or URL alphabet)
//	ditto.after=WHAT        poweroff (default), reboot, halt or shell: what follows the command
//	ditto.hostname=NAME     default "ditto"
//	ditto.net=SPEC          off, dhcp (default), or [IFACE,]{off|dhcp|ADDR/PREFIX[,GATEWAY[,DNS...]]}; repeatable
//	ditto.netwait=DURATION  how long a command waits for the network (default 10s; a shell does not wait)
//	ditto.mount=SPEC        auto (default), off, or SOURCE,DIR[,ro] with SOURCE a device, a name or LABEL=...; repeatable
//	ditto.modules=A,B       modules to load besides those the hardware asks for
//	ditto.shell=PATH        default: the image's own
//	ditto.term=NAME         TERM of the shell on a serial console (default "screen")
//	ditto.winsize=COLSxROWS size of a console that does not know its own (default 80x24)
//	ditto.stop=DURATION     time processes get between SIGTERM and SIGKILL (default 3s)
//	root= rootfstype= rootflags= ro rw init=   as for the kernel; root= also takes LABEL= and UUID=
//
// A command may also stand in the file /etc/ditto/run of the initramfs.
//
// # Lines on the console
//
// Every line of the program starts with "ditto-init: ". These four are stable:
//
//	ditto-init: start uptime=0.812345 kernel=6.12.95+deb12-cloud-amd64
//	ditto-init: ready uptime=1.034567 modules=9 disks=1 nets=1
//	ditto-init: exit status=0 seconds=0.123     (or status=137 signal=9)
//	ditto-init: end action=poweroff reason="power button" uptime=2.345678
//
// Uptime is CLOCK_BOOTTIME in seconds. After a restore follows, when the wall clock
// is right again and by how many seconds it was moved:
//
//	ditto-init: clock moved=3600.123
package main
