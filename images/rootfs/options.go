package rootfs

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"

	"ditto.vm/images/cache"
	"ditto.vm/images/debian"
)

// formatVersion changes when the same options give another disk.
const formatVersion = "1"

// Options say what the root file system has. The zero value is a small system
// that anyone at the console may log in to as root.
type Options struct {
	// CacheDir is the cache root; "" means cache.Dir.
	CacheDir string
	// Packages are installed besides the base system. "name/suite" and
	// "name=version" are as for apt-get install.
	Packages []string
	// Kernel is a kernel package to install, such as "linux-image-cloud-amd64"
	// or "linux-image-cloud-amd64/bookworm-backports"; "" installs none.
	Kernel string
	// KernelArgs are what the boot menu appends for Kernel besides root=.
	// "" means "quiet console=ttyS0".
	KernelArgs string
	// SizeBytes is the size of the disk; 0 leaves 512 MiB free.
	SizeBytes int64
	// Label of the file system; "" means "rootfs".
	Label string
	// Hostname of the guest; "" means "debian".
	Hostname string
	// RootPassword is the password of root; "" means none is asked for.
	RootPassword string
	// Autologin logs root in on the console without a prompt.
	Autologin bool
	// Progress hears how far the build is; it may be nil.
	Progress debian.Progress
}

const defaultSlackBytes = 512 << 20

// basePackages are what the configuration of this package relies on.
func basePackages() []string {
	return []string{
		"systemd-sysv", "udev", "dbus", "libpam-systemd", "systemd-resolved", "kmod",
		"iproute2", "iputils-ping", "procps", "util-linux-extra", "e2fsprogs",
		"debian-archive-keyring", "ca-certificates", "less", "kexec-tools",
	}
}

// The expressions are compiled when first used: this package is linked into the
// machine's process, where every initializer counts.
var (
	packageRE = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]*(:[a-z0-9]+)?([/=][A-Za-z0-9+.~:-]+)?$`)
	})
	hostnameRE = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]{0,62})$`)
	})
	labelRE = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`^[A-Za-z0-9._-]{1,16}$`)
	})
)

// ErrNeedsRoot says that the caller lacks the rights to make a root file system.
var ErrNeedsRoot = errors.New("making a root file system needs root, because its files belong to the guest's users: run it with sudo")

// complete checks the options and fills in the defaults.
func (o *Options) complete() error {
	o.CacheDir = orDefault(o.CacheDir, cache.Dir())
	o.Label = orDefault(o.Label, "rootfs")
	o.Hostname = orDefault(o.Hostname, "debian")
	o.KernelArgs = orDefault(o.KernelArgs, "quiet console=ttyS0")
	for _, p := range append(slices.Clone(o.Packages), o.Kernel) {
		if p != "" && !packageRE().MatchString(p) {
			return fmt.Errorf("%q is not the name of a package", p)
		}
	}
	switch {
	case !labelRE().MatchString(o.Label):
		return fmt.Errorf("label %q: want 1 to 16 letters, digits, dots, dashes or underscores", o.Label)
	case !hostnameRE().MatchString(o.Hostname):
		return fmt.Errorf("%q is not a host name", o.Hostname)
	case strings.ContainsAny(o.KernelArgs, "'\n"):
		return fmt.Errorf("kernel arguments %q: want one line without single quotes", o.KernelArgs)
	case strings.ContainsAny(o.RootPassword, "\n:"):
		return errors.New("a password must not hold a newline or a colon")
	}
	return nil
}

func orDefault(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

func (o *Options) packages() []string {
	all := append(basePackages(), o.Packages...)
	if o.Kernel != "" {
		all = append(all, "initramfs-tools", "zstd", o.Kernel)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// key is a content key of everything that shapes the disk, except the state of
// the archive: a cached disk stays as it is until it is deleted.
func (o *Options) key() string {
	h := sha256.New()
	for _, p := range append(o.packages(), formatVersion, debian.Codename, o.Kernel, o.KernelArgs,
		fmt.Sprint(o.SizeBytes), o.Label, o.Hostname, o.RootPassword, fmt.Sprint(o.Autologin),
		runScript, runUnit, networkUnit) {
		fmt.Fprintf(h, "%d:%s,", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil))[:20]
}

func isRoot() bool { return os.Geteuid() == 0 }
