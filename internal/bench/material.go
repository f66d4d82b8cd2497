package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"

	"ditto.vm/internal/material"
	"ditto.vm/vmm/kvm"
)

// Prepare finds or makes what the benchmarks of names need. What cannot be had
// is noted in Missing.
func (e *Env) Prepare(ctx context.Context, benchmarks []Benchmark, progress Progress) {
	e.Missing = map[string]string{}
	var err error
	if e.QEMU, err = exec.LookPath("qemu-system-x86_64"); err != nil {
		e.Missing["QEMU"] = "qemu-system-x86_64 is not installed: run make setup"
	}
	if fi, err := os.Stat(e.Ditto); err != nil || !fi.Mode().IsRegular() {
		e.Missing["Ditto"] = fmt.Sprintf("there is no program %q: run make build or give --ditto", e.Ditto)
		e.Ditto = ""
	}
	needsLinux, needsDisk := false, false
	for _, b := range benchmarks {
		needsLinux = needsLinux || b.Where == Lab
		needsDisk = needsDisk || b.NeedsDisk
	}
	if needsLinux {
		progress("kernel and initramfs")
		if err := e.prepareLinux(ctx); err != nil {
			e.Missing["Kernel"], e.Missing["Initrd"] = err.Error(), err.Error()
		}
	}
	if needsDisk && e.RootDisk == "" {
		progress("Debian root disk")
		image, err := material.Debian(ctx, nil)
		if err != nil {
			e.Missing["RootDisk"] = err.Error()
		} else {
			e.RootDisk = image.Path
		}
	}
}

func (e *Env) prepareLinux(ctx context.Context) error {
	k, err := material.Kernel(ctx, material.CloudKernel, nil)
	if err != nil {
		return err
	}
	image, err := material.URoot(ctx, k)
	if err != nil {
		return err
	}
	e.Kernel, e.Initrd = k.Image, image.Path
	return nil
}

// LinuxRunsHere tells whether this machine's own KVM runs Linux guests, and
// why not.
func LinuxRunsHere() (bool, string) {
	system, err := kvm.Open()
	if err != nil {
		return false, err.Error()
	}
	defer func() { _ = system.Close() }()
	linux, err := system.ProbeLinux()
	if err != nil {
		return false, err.Error()
	}
	return linux.OK, linux.Reason
}

// bringClose copies into the scratch folder what is read at every start, so
// that the file system below the original has no part in what is measured.
func (e *Env) bringClose() error {
	// The user-mode network's program is looked for beside ditto.
	if netd := filepath.Join(filepath.Dir(e.Ditto), "ditto-netd"); e.Ditto != "" {
		err := copyFile(filepath.Join(e.Scratch, "ditto-netd"), netd)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, path := range []*string{&e.Ditto, &e.Kernel, &e.Initrd} {
		if *path == "" {
			continue
		}
		to := filepath.Join(e.Scratch, filepath.Base(*path))
		if err := copyFile(to, *path); err != nil {
			return err
		}
		*path = to
	}
	return nil
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, info.Mode().Perm()|0o200)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Sync(), out.Close())
}
