package rootfs

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

var (
	//go:embed files/ditto-run
	runScript string
	//go:embed files/ditto-run.service
	runUnit string
	//go:embed files/80-ethernet.network
	networkUnit string
)

// file is one file of the configuration.
type file struct {
	path string // in the guest, without the leading slash
	mode os.FileMode
	text string
}

func (o *Options) files() []file {
	fs := []file{
		{"etc/hostname", 0o644, o.Hostname + "\n"},
		{"etc/hosts", 0o644, "127.0.0.1 localhost\n127.0.1.1 " + o.Hostname + "\n::1 localhost ip6-localhost\n"},
		{"etc/fstab", 0o644, "LABEL=" + o.Label + " / ext4 errors=remount-ro 0 1\n"},
		{"etc/systemd/network/80-ethernet.network", 0o644, networkUnit},
		{"usr/local/sbin/ditto-run", 0o755, runScript},
		{"etc/systemd/system/ditto-run.service", 0o644, runUnit},
		// One lease is enough to go on; several interfaces may have no server.
		{"etc/systemd/system/systemd-networkd-wait-online.service.d/any.conf", 0o644,
			"[Service]\nExecStart=\nExecStart=/lib/systemd/systemd-networkd-wait-online --any --timeout=20\n"},
		{"etc/systemd/logind.conf.d/power.conf", 0o644, "[Login]\nHandlePowerKey=poweroff\nPowerKeyIgnoreInhibited=yes\n"},
	}
	if o.Autologin {
		fs = append(fs, file{"etc/systemd/system/serial-getty@.service.d/autologin.conf", 0o644,
			"[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --keep-baud 115200,57600,38400,9600 %I $TERM\n"})
	}
	return fs
}

// wantedUnits are enabled by links in multi-user.target.wants.
func wantedUnits() map[string]string {
	return map[string]string{
		"multi-user.target.wants/ditto-run.service":                        "/etc/systemd/system/ditto-run.service",
		"multi-user.target.wants/systemd-networkd.service":                 "/lib/systemd/system/systemd-networkd.service",
		"sockets.target.wants/systemd-networkd.socket":                     "/lib/systemd/system/systemd-networkd.socket",
		"network-online.target.wants/systemd-networkd-wait-online.service": "/lib/systemd/system/systemd-networkd-wait-online.service",
		"multi-user.target.wants/systemd-resolved.service":                 "/lib/systemd/system/systemd-resolved.service",
	}
}

// configure writes the guest's configuration into root and returns the release
// of the kernel in it, if any.
func (o *Options) configure(ctx context.Context, root string) (release string, err error) {
	for _, f := range o.files() {
		if err := writeFile(root, f); err != nil {
			return "", err
		}
	}
	for link, target := range wantedUnits() {
		if err := symlink(target, filepath.Join(root, "etc/systemd/system", link)); err != nil {
			return "", err
		}
	}
	if err := symlink("/run/systemd/resolve/stub-resolv.conf", filepath.Join(root, "etc/resolv.conf")); err != nil {
		return "", err
	}
	if err := o.setPassword(ctx, root); err != nil {
		return "", err
	}
	if o.Kernel == "" {
		return "", nil
	}
	return o.writeBootMenu(root)
}

func writeFile(root string, f file) error {
	path := filepath.Join(root, f.path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	_ = os.Remove(path) // it may be a link that leads out of root
	if err := os.WriteFile(path, []byte(f.text), f.mode); err != nil {
		return err
	}
	return os.Chmod(path, f.mode)
}

func symlink(target, link string) error {
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
		return err
	}
	if err := os.Remove(link); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.Symlink(target, link)
}

// setPassword gives root its password, or takes the lock off an empty one.
func (o *Options) setPassword(ctx context.Context, root string) error {
	if o.RootPassword == "" {
		return clearPassword(filepath.Join(root, "etc/shadow"))
	}
	cmd := exec.CommandContext(ctx, "chroot", root, "/usr/sbin/chpasswd", "-c", "SHA512")
	cmd.Stdin = strings.NewReader("root:" + o.RootPassword + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("chpasswd: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

func clearPassword(shadow string) error {
	b, err := os.ReadFile(shadow)
	if err != nil {
		return err
	}
	lines := strings.Split(string(b), "\n")
	for i, line := range lines {
		if f := strings.Split(line, ":"); f[0] == "root" && len(f) > 2 {
			f[1] = ""
			lines[i] = strings.Join(f, ":")
		}
	}
	return os.WriteFile(shadow, []byte(strings.Join(lines, "\n")), 0o640)
}

// writeBootMenu writes the menu that u-root's boot, and GRUB, read.
func (o *Options) writeBootMenu(root string) (release string, err error) {
	kernels, err := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil {
		return "", err
	}
	if len(kernels) == 0 {
		return "", fmt.Errorf("package %s put no kernel into /boot", o.Kernel)
	}
	slices.Sort(kernels)
	release = strings.TrimPrefix(filepath.Base(kernels[len(kernels)-1]), "vmlinuz-")
	if _, err := os.Stat(filepath.Join(root, "boot/initrd.img-"+release)); err != nil {
		return "", fmt.Errorf("no initrd for kernel %s: %w", release, err)
	}
	return release, writeFile(root, file{"boot/grub/grub.cfg", 0o644, bootMenu(release, o.Label, o.KernelArgs)})
}

func bootMenu(release, label, args string) string {
	return fmt.Sprintf(`set default=0
set timeout=0
menuentry 'Debian GNU/Linux, %[1]s' {
	linux /boot/vmlinuz-%[1]s root=LABEL=%[2]s ro %[3]s
	initrd /boot/initrd.img-%[1]s
}
`, release, label, args)
}
