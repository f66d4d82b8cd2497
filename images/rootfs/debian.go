package rootfs

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"ditto.vm/images/cache"
	"ditto.vm/images/debian"
	"ditto.vm/images/mkdisk"
)

const (
	diskFile     = "rootfs.ext4"
	manifestFile = "manifest.json"
)

// Image is a finished disk in the cache. Copy it before a VM writes to it.
type Image struct {
	mkdisk.Disk
	Packages []string `json:"packages"`          // asked for, with the base system's
	Release  string   `json:"release,omitempty"` // of the kernel in /boot
}

// Debian returns the disk that o describes, from the cache or newly made. Of
// several processes that make the same disk one works, the others wait.
func Debian(ctx context.Context, o Options) (*Image, error) {
	if err := o.complete(); err != nil {
		return nil, fmt.Errorf("root file system: %w", err)
	}
	dst := filepath.Join(o.CacheDir, "rootfs", o.key())
	err := cache.MakeDir(ctx, dst, func(tmp string) error { return o.build(ctx, tmp) })
	if err != nil {
		return nil, fmt.Errorf("root file system: %w", err)
	}
	return readImage(dst)
}

func readImage(dir string) (*Image, error) {
	b, err := os.ReadFile(filepath.Join(dir, manifestFile))
	if err != nil {
		return nil, fmt.Errorf("root file system: %w", err)
	}
	var img Image
	if err := json.Unmarshal(b, &img); err != nil {
		return nil, fmt.Errorf("root file system: %s: %w", manifestFile, err)
	}
	img.Path = filepath.Join(dir, diskFile)
	return &img, nil
}

func (o *Options) build(ctx context.Context, tmp string) error {
	if !isRoot() {
		return ErrNeedsRoot
	}
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		return fmt.Errorf("mmdebstrap: %w: install it with apt-get install mmdebstrap", mkdisk.ErrNoTool)
	}
	archive, err := debian.Open(ctx, o.CacheDir, o.Progress)
	if err != nil {
		return err
	}
	root := filepath.Join(tmp, "root")
	defer func() { _ = os.RemoveAll(root) }()
	if err := o.bootstrap(ctx, archive, root); err != nil {
		return err
	}
	o.report("configure the guest", 0)
	img := Image{Packages: o.packages()}
	if img.Release, err = o.configure(ctx, root); err != nil {
		return fmt.Errorf("configure: %w", err)
	}
	o.report("configure the guest", 1)
	return o.finish(ctx, tmp, root, img)
}

// bootstrap installs the packages into the folder root.
func (o *Options) bootstrap(ctx context.Context, archive *debian.Archive, root string) error {
	const what = "install Debian"
	o.report(what, 0)
	cmd := exec.CommandContext(ctx, "mmdebstrap",
		"--mode=root", "--variant=minbase", "--format=directory", "--quiet",
		"--architectures=amd64", "--components=main",
		"--include="+strings.Join(o.packages(), ","),
		`--aptopt=Apt::Install-Recommends "false"`,
		`--aptopt=Acquire::Languages "none"`,
		"--dpkgopt=path-exclude=/usr/share/man/*",
		"--dpkgopt=path-exclude=/usr/share/locale/*",
		"--dpkgopt=path-exclude=/usr/share/doc/*",
		"--dpkgopt=path-include=/usr/share/doc/*/copyright",
		debian.Codename, root, archive.SourcesPath())
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive", "SOURCE_DATE_EPOCH="+sourceDate)
	// In a mount namespace of its own whatever it mounts goes with it, even when
	// it is killed, and removing the folder never reaches into /dev or /proc.
	// The process group is for stopping it together with apt and dpkg.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if err != nil && cmd.Process != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // what is left of it
	}
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("mmdebstrap: %w: %s", err, lastLines(out.String(), 6))
	}
	o.report(what, 1)
	return nil
}

// sourceDate is the time that generated files carry, so that the same packages
// make the same files.
const sourceDate = "1700000000"

func (o *Options) finish(ctx context.Context, tmp, root string, img Image) error {
	o.report("make the disk", 0)
	disk, err := mkdisk.Make(ctx, mkdisk.Options{
		Path: filepath.Join(tmp, diskFile), Folder: root,
		SizeBytes: o.SizeBytes, SlackBytes: defaultSlackBytes, Label: o.Label,
	})
	if err != nil {
		return err
	}
	if err := os.RemoveAll(root); err != nil {
		return err
	}
	img.Disk = *disk
	b, err := json.MarshalIndent(img, "", "  ")
	if err != nil {
		return err
	}
	o.report("make the disk", 1)
	return os.WriteFile(filepath.Join(tmp, manifestFile), append(b, '\n'), 0o644)
}

func (o *Options) report(what string, fraction float64) {
	if o.Progress != nil {
		o.Progress.Report(what, fraction)
	}
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "\n")
}
