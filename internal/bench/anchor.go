package bench

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/u-root/u-root/pkg/cpio"

	"ditto.vm/internal/material"
)

// busyboxPath is Debian's static busybox, of the package busybox-static.
const busyboxPath = "/usr/bin/busybox"

// anchorInit is the first process of the anchor guest: a shell.
const anchorInit = `#!/bin/busybox sh
/bin/busybox mkdir -p /bin /sbin /usr/bin /usr/sbin /proc /sys /dev /tmp /run
/bin/busybox --install -s
mount -t devtmpfs dev /dev
for m in /modules/*; do insmod $m; done
cd /tmp
exec sh -i
`

// anchorTick prints a dot each millisecond. Nothing is executed for it: the shell
// waits for input that does not come.
const anchorTick = `[ -e /tmp/never ] || mkfifo /tmp/never; { exec 3<>/tmp/never; while :; do read -t 0.001 x <&3; printf .; done; }`

// anchorCmdline lets the guest stay in its initramfs.
const anchorCmdline = "console=ttyS0 quiet panic=-1"

// anchorGuest is the guest, with an overlay on the disk that holds its files:
// kernel and initramfs are small, so that its memory is what it reads.
func anchorGuest(env *Env, initrd, disk string) spec {
	return spec{
		kernel: env.Kernel, initrd: initrd, cmdline: anchorCmdline,
		memoryMiB: anchorMemoryMiB, cpus: loadCPUs,
		disks: []guestDisk{{path: disk, cache: "writeback"}},
	}
}

// needAnchor skips a benchmark that lacks what the guest is made of.
func needAnchor(env *Env) error {
	if err := env.need("Ditto", env.Ditto, "QEMU", env.QEMU, "Kernel", env.Kernel); err != nil {
		return err
	}
	if _, err := os.Stat(busyboxPath); err != nil {
		return &Unavailable{Reason: err.Error() + ": run make setup"}
	}
	return nil
}

// makeAnchor makes what guests are started from in a folder: an initramfs, and
// the image with the files, with ditto's index of it.
func makeAnchor(ctx context.Context, env *Env, dir string) (initrd, files string, err error) {
	initrd, files = filepath.Join(dir, "initrd.cpio"), filepath.Join(dir, "files.raw")
	if err := makeAnchorInitrd(ctx, initrd); err != nil {
		return "", "", fmt.Errorf("initramfs: %w", err)
	}
	if err := makeAnchorFiles(ctx, files); err != nil {
		return "", "", err
	}
	_, err = output(ctx, env.Ditto, "image", "index", files)
	return initrd, files, err
}

func makeAnchorInitrd(ctx context.Context, path string) error {
	k, err := material.Kernel(ctx, material.CloudKernel, nil)
	if err != nil {
		return err
	}
	modules, err := k.Modules("virtio_pci", "virtio_blk", "ext4")
	if err != nil {
		return err
	}
	busybox, err := os.ReadFile(busyboxPath)
	if err != nil {
		return err
	}
	records := []cpio.Record{
		cpio.Directory("bin", 0o755), cpio.Directory("dev", 0o755), cpio.Directory("modules", 0o755),
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.StaticFile("bin/busybox", string(busybox), 0o755),
		cpio.StaticFile("init", anchorInit, 0o755),
	}
	for i, m := range modules {
		records = append(records, cpio.StaticFile(fmt.Sprintf("modules/%02d-%s.ko", i, m.Name), string(m.Data), 0o644))
	}
	var out bytes.Buffer
	w := cpio.Newc.Writer(&out)
	if err := cpio.WriteRecords(w, records); err != nil {
		return err
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return err
	}
	return os.WriteFile(path, out.Bytes(), 0o644)
}

// overlayOn makes an empty qcow2 image on a raw one.
func overlayOn(ctx context.Context, below, image string) error {
	_, err := output(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "raw", image)
	return err
}
