package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"

	"ditto.vm/images/cache"
	"ditto.vm/images/debian"
	"ditto.vm/images/kernel"
)

// bootModules are loaded by the lab's init. The first group is what the root
// file system needs; the others are loaded beside each other while the root is
// being mounted. Built-in ones are skipped.
var bootModules = [][]string{
	{"netfs", "9pnet", "9pnet_virtio", "9p", "overlay"},
	{"irqbypass", "kvm", "ccp", "kvm_amd"},
	{"crc32c_generic", "crc32c_intel", "virtio_blk", "ext4"},
}

// demandModules must exist in the lab's kernel; they are loaded when first used
// or by modprobe.
var demandModules = []string{
	"tun", "bridge", "veth", "virtio_net", "af_packet", "loop", "zram", "nbd",
	"vhost_net", "vhost_vsock", "sch_tbf", "sch_netem", "sch_htb", "dm_flakey", "nfsd", "nfs",
	"hwpoison_inject", "ib_uverbs", "rdma_rxe", "rdma_ucm",
}

// cached is what is kept for a kernel.
type cached struct {
	kernel      kernel.Kernel
	image       string // to boot: decompressed if possible
	modules     string // cpio archive of the boot modules
	modulesRoot string // folder to put over /lib/modules
}

// layout is the version of what prepare makes; a change makes it anew.
const layout = "2"

// prepare finds the kernel and makes what is kept in the cache for it.
func prepare(ctx context.Context, o Options) (cached, error) {
	k, err := kernel.NewStore(o.CacheDir, o.Progress).Ensure(ctx, o.Kernel)
	if err != nil {
		return cached{}, fmt.Errorf("lab: %w", err)
	}
	if k.ModulesDir == "" {
		return cached{}, fmt.Errorf("lab: no modules found for kernel %s", k.Image)
	}
	root := o.CacheDir
	if root == "" {
		root = cache.Dir()
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %s %s %s", layout, k.ModulesDir, bootModules, demandModules))
	dir := filepath.Join(root, "lab", k.Version+"-"+hex.EncodeToString(sum[:6]))
	err = cache.MakeDir(ctx, dir, func(tmp string) error {
		const what = "prepare the lab's kernel"
		report(o.Progress, what, 0)
		if err := packModules(k, filepath.Join(tmp, "modules.cpio")); err != nil {
			return err
		}
		report(o.Progress, what, 0.5)
		if err := indexModules(ctx, k, filepath.Join(tmp, "root")); err != nil {
			return err
		}
		if err := decompressKernel(k.Image, filepath.Join(tmp, "kernel")); err != nil {
			return err
		}
		report(o.Progress, what, 1)
		return nil
	})
	if err != nil {
		return cached{}, fmt.Errorf("lab: %w", err)
	}
	return cached{
		kernel:      k,
		image:       filepath.Join(dir, "kernel"),
		modules:     filepath.Join(dir, "modules.cpio"),
		modulesRoot: filepath.Join(dir, "root", "lib", "modules"),
	}, nil
}

func report(p debian.Progress, what string, fraction float64) {
	if p != nil {
		p.Report(what, fraction)
	}
}

// packModules writes a part of the initramfs: the boot modules, named by group
// and so that they sort in the order in which they are loaded.
func packModules(k kernel.Kernel, path string) error {
	for _, name := range demandModules {
		if !k.HasModule(name) {
			return fmt.Errorf("kernel %s lacks the module %s: the lab needs a generic kernel", k.Version, name)
		}
	}
	records := []cpio.Record{cpio.Directory("modules", 0o755)}
	packed := map[string]bool{}
	for group, names := range bootModules {
		mods, err := k.Modules(names...)
		if err != nil {
			return err
		}
		for i, m := range mods {
			if packed[m.Name] {
				continue
			}
			packed[m.Name] = true
			name := fmt.Sprintf("modules/%d-%03d-%s.ko", group, i, m.Name)
			records = append(records, cpio.StaticFile(name, string(trimModule(m.Data)), 0o644))
		}
	}
	return writeCPIO(path, records)
}

// writeCPIO writes an uncompressed archive: the kernel reads several of them
// one behind the other.
func writeCPIO(path string, records []cpio.Record) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	w := cpio.Newc.Writer(f)
	if err := cpio.WriteRecords(w, records); err != nil {
		return err
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return err
	}
	return f.Close()
}

// indexModules makes root/lib/modules/<version> with hard links to the
// package's modules and the indexes that modprobe needs, which Debian's
// packages leave to the installation.
func indexModules(ctx context.Context, k kernel.Kernel, root string) error {
	depmod, err := lookTool("depmod")
	if err != nil {
		return err
	}
	dst := filepath.Join(root, "lib", "modules", k.Version)
	err = filepath.WalkDir(k.ModulesDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(k.ModulesDir, path)
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			return os.MkdirAll(filepath.Join(dst, rel), 0o755)
		case d.Type().IsRegular():
			return os.Link(path, filepath.Join(dst, rel))
		}
		return nil // links into source packages
	})
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, depmod, "-b", root, k.Version).CombinedOutput()
	if err != nil {
		return fmt.Errorf("depmod: %w: %s", err, out)
	}
	return nil
}

// lookTool finds a program of the machine, also where only root's PATH looks.
func lookTool(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("the lab needs %s, which is not installed: run scripts/setup: %w", name, exec.ErrNotFound)
}

// buildInit builds the lab's process 1 from the source tree around the current
// folder.
func buildInit(ctx context.Context, path string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-ldflags=-s -w", "-o", path, "ditto.vm/internal/lab/init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("the lab needs the Go toolchain to build its init: %w", err)
	}
	return fmt.Errorf("build the lab's init (run this inside ditto's source tree): %w: %s", err, strings.TrimSpace(string(out)))
}
