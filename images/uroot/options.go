package uroot

import (
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"fmt"
	"hash"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"ditto.vm/images/cache"
	"ditto.vm/images/debian"
	"ditto.vm/images/kernel"
)

// The module in which the image is compiled. They have other names than go.mod
// and go.sum because go:embed leaves nested modules out.
var (
	//go:embed module/gomod.txt
	goMod []byte
	//go:embed module/gosum.txt
	goSum []byte
)

// formatVersion changes when the same inputs give another image.
const formatVersion = "1"

// Options say what goes into an image. Init is required.
type Options struct {
	// CacheDir is the cache root; "" means cache.Dir.
	CacheDir string
	// Kernel is the kernel whose modules are packed. Without a modules folder
	// the image has none and suits kernels with everything built in.
	Kernel kernel.Kernel
	// Init holds the Go sources of process 1: guest.InitSource.
	Init fs.FS
	// Commands are the import paths of u-root's commands, and "*" may end one.
	// nil means DefaultCommands. A path may be followed by "@version" when it
	// belongs to a module other than u-root's.
	Commands []string
	// Tags are build tags for the commands. nil means DefaultTags.
	Tags []string
	// Modules are kernel modules to pack and always load besides the default
	// ones. The kernel must have each, built in or as a module.
	Modules []string
	// Files are added to the archive, or replace what it has: guest path
	// without the leading slash to host path.
	Files map[string]string
	// Run is a command for the image to run at boot; see guest/init.
	Run string
	// GoCommand is the go tool; "" looks in PATH and the usual places.
	GoCommand string
	// Progress hears how far the build is; it may be nil.
	Progress debian.Progress
}

// DefaultCommands are u-root's core commands, without those that ditto's init
// takes the place of, and those that boot other systems.
func DefaultCommands() []string {
	return []string{
		"github.com/u-root/u-root/cmds/core/*",
		"-github.com/u-root/u-root/cmds/core/init",
		"-github.com/u-root/u-root/cmds/core/poweroff",
		"-github.com/u-root/u-root/cmds/core/shutdown",
		"-github.com/u-root/u-root/cmds/core/sluinit",
		"github.com/u-root/u-root/cmds/boot/boot",
		"github.com/u-root/u-root/cmds/exp/dmidecode",
		"github.com/u-root/u-root/cmds/exp/hdparm",
		"github.com/u-root/u-root/cmds/exp/partprobe",
		"github.com/u-root/u-root/cmds/exp/tac",
		"github.com/u-root/u-root/cmds/exp/watch",
	}
}

// DefaultTags choose gosh's plain line input. Its other editors query the
// terminal (which may not be attached, or be a log) and redraw the line with
// escape sequences at each key.
func DefaultTags() []string { return []string{"goshsmall", "grpcnotrace"} }

// defaultModules are what a guest of ditto may need, in no order. Each is
// packed if the kernel has it as a module; init loads what the hardware asks
// for, and the kernel calls for the rest (file systems, sockets) by itself.
func defaultModules() []string {
	return strings.Fields(`
		virtio_pci virtio_mmio virtio_blk virtio_net virtio_balloon virtio_rng
		virtio_console virtio_mem virtio_pmem virtio_input
		vsock vmw_vsock_virtio_transport virtiofs fuse 9p 9pnet_virtio
		pvpanic pvpanic_pci pvpanic_mmio button evdev vmgenid ptp_kvm qemu_fw_cfg
		af_packet
		ext4 crc32c_generic crc32c_intel crc32c_cryptoapi vfat nls_cp437 nls_ascii nls_iso8859_1 nls_utf8
		isofs squashfs overlay loop zram`)
}

// alwaysModules are loaded at boot without a device that asks for them: the
// power button's events have no reader otherwise.
func alwaysModules() []string { return []string{"evdev", "button"} }

// initLinks are the names under /sbin by which init is called.
func initLinks() []string {
	return []string{"modprobe", "poweroff", "reboot", "halt", "shutdown", "boot"}
}

func (o Options) cacheDir() string {
	if o.CacheDir != "" {
		return o.CacheDir
	}
	return cache.Dir()
}

// release names the kernel as uname -r does; its modules lie in a folder of
// that name.
func (o Options) release() string {
	if o.Kernel.Version == "" && o.Kernel.ModulesDir != "" {
		return filepath.Base(o.Kernel.ModulesDir)
	}
	return o.Kernel.Version
}

func (o Options) commands() []string {
	if o.Commands != nil {
		return o.Commands
	}
	return DefaultCommands()
}

func (o Options) tags() []string {
	if o.Tags != nil {
		return o.Tags
	}
	return DefaultTags()
}

// key is a content key: whatever changes the bytes it stands for is in it.
type key struct{ h hash.Hash }

func newKey(kind string) key {
	k := key{sha256.New()}
	k.add(kind, formatVersion, string(goMod), string(goSum))
	return k
}

// add writes length-prefixed strings, so that no two lists look alike.
func (k key) add(parts ...string) {
	for _, p := range parts {
		fmt.Fprintf(k.h, "%d:%s,", len(p), p)
	}
}

func (k key) String() string { return hex.EncodeToString(k.h.Sum(nil))[:20] }

// initKey names the compiled init program.
func (o Options) initKey() (string, error) {
	k := newKey("init")
	k.add(initFlags()...)
	names, err := initFiles(o.Init)
	if err != nil {
		return "", err
	}
	for _, name := range names {
		b, err := fs.ReadFile(o.Init, name)
		if err != nil {
			return "", err
		}
		k.add(name, string(b))
	}
	return k.String(), nil
}

// initFiles lists the sources of the init program without its tests.
func initFiles(src fs.FS) ([]string, error) {
	names, err := fs.Glob(src, "*.go")
	names = slices.DeleteFunc(names, func(n string) bool { return strings.HasSuffix(n, "_test.go") })
	if err == nil && len(names) == 0 {
		err = fmt.Errorf("no sources of the init program")
	}
	return names, err
}

// commandsKey names the compiled busybox.
func (o Options) commandsKey() string {
	k := newKey("commands")
	k.add(o.commands()...)
	k.add("tags")
	k.add(o.tags()...)
	return k.String()
}

// imageKey names the whole image.
func (o Options) imageKey() (string, error) {
	initKey, err := o.initKey()
	if err != nil {
		return "", err
	}
	k := newKey("image")
	k.add(initKey, o.commandsKey(), o.Run)
	k.add(initLinks()...)
	k.add(defaultModules()...)
	k.add(o.Modules...)
	k.add(kernelIdentity(o.Kernel)...)
	for _, name := range sortedKeys(o.Files) {
		fi, err := os.Stat(o.Files[name])
		if err != nil {
			return "", err
		}
		k.add(name, o.Files[name], fmt.Sprint(fi.Size(), fi.ModTime().UnixNano(), fi.Mode()))
	}
	return k.String(), nil
}

// kernelIdentity tells builds of a kernel apart, even two of one release: the
// list of modules carries the time of the build.
func kernelIdentity(k kernel.Kernel) []string {
	id := []string{k.Version}
	if k.ModulesDir == "" {
		return id
	}
	for _, name := range []string{"modules.order", "modules.builtin"} {
		if fi, err := os.Stat(filepath.Join(k.ModulesDir, name)); err == nil {
			id = append(id, name, fmt.Sprint(fi.Size(), fi.ModTime().UnixNano()))
		}
	}
	return id
}

// check finds mistakes of the caller before anything is built.
func (o Options) check() error {
	if o.Init == nil {
		return fmt.Errorf("u-root image: no sources of the init program")
	}
	for name := range o.Files {
		if path.IsAbs(name) || !fs.ValidPath(name) || name == "." {
			return fmt.Errorf("u-root image: %q is not a path inside the image (want etc/motd, not /etc/motd)", name)
		}
	}
	return nil
}
