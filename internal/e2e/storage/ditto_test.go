package storage

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"

	"ditto.vm/images/kernel"
	"ditto.vm/internal/labtest"
)

// guestLimit bounds one guest. Under emulation it is up in ten seconds; the
// machine may be busy with others.
var guestLimit = time.Duration(labtest.Count(5, 20)) * time.Minute

// kernelSpec is the kernel of the guests.
const kernelSpec = "6.12-cloud"

// guestImages are the files a guest is started from.
type guestImages struct{ kernel, initrd string }

// args is the command line of a guest that does a job with disks, without
// the flags of its name.
func (g guestImages) args(job map[string]string, disks ...string) []string {
	words := []string{"quiet", "loglevel=3", "panic=-1"}
	for name, value := range job {
		words = append(words, jobPrefix+name+"="+value)
	}
	args := []string{
		"run", "--kernel", g.kernel, "--initrd", g.initrd, "--net", "none", "--memory", "384M",
		"--append", strings.Join(words, " "),
	}
	for _, d := range disks {
		args = append(args, "--disk", d)
	}
	return args
}

// newGuest makes the initramfs of the guests in a folder: this test binary, and
// the drivers.
func newGuest(t *testing.T, dir string) guestImages {
	t.Helper()
	k, err := kernel.NewStore("", nil).Find(kernelSpec)
	if err != nil {
		t.Fatalf("%v; try: make test, which fetches the kernels", err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	if f, err := elf.NewFile(bytes.NewReader(program)); err != nil {
		t.Fatal(err)
	} else if libs, err := f.ImportedLibraries(); err != nil || len(libs) > 0 {
		t.Fatalf("this test binary needs %q, %v, and a guest has no libraries; try: CGO_ENABLED=0", libs, err)
	}
	records := []cpio.Record{
		cpio.Directory("dev", 0o755), cpio.Directory("modules", 0o755),
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.StaticFile("init", string(program), 0o755),
	}
	modules, err := k.Modules("virtio_pci", "virtio_blk", "ext4")
	if err != nil {
		t.Fatal(err)
	}
	for i, m := range modules {
		records = append(records, cpio.StaticFile(fmt.Sprintf("modules/%02d-%s.ko", i, m.Name), string(m.Data), 0o644))
	}
	var out bytes.Buffer
	w := cpio.Newc.Writer(&out)
	if err := cpio.WriteRecords(w, records); err != nil {
		t.Fatal(err)
	}
	if err := cpio.WriteTrailer(w); err != nil {
		t.Fatal(err)
	}
	g := guestImages{kernel: k.Image, initrd: filepath.Join(dir, "initrd.cpio")}
	if err := os.WriteFile(g.initrd, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return g
}

// tool runs a program of the host and returns what it prints. Exit statuses
// other than 0 and those allowed fail the test.
func tool(t *testing.T, allowed []int, name string, args ...string) string {
	t.Helper()
	code, out := try(t, name, args...)
	for _, c := range append(allowed, 0) {
		if code == c {
			return out
		}
	}
	t.Fatalf("%s %q: exit status %d\n%s", name, args, code, out)
	return ""
}

// try runs a program of the host and returns its exit status and output.
func try(t *testing.T, name string, args ...string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), guestLimit)
	defer cancel()
	path, err := exec.LookPath(name)
	if err != nil {
		// A user's PATH may lack the folders of e2fsprogs.
		if path, err = exec.LookPath(filepath.Join("/usr/sbin", name)); err != nil {
			t.Fatalf("%v; try: make setup", err)
		}
	}
	cmd := exec.CommandContext(ctx, path, args...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatalf("%s: %v", name, err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

// sparse makes a file of holes.
func sparse(t *testing.T, path string, size int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
}

// mkfs makes an empty ext4 file system in an image; files are put into it.
func mkfs(t *testing.T, path string, size int64, files string) {
	t.Helper()
	sparse(t, path, size)
	args := []string{"-q", "-F", "-E", "lazy_itable_init=0,nodiscard"}
	if files != "" {
		args = append(args, "-d", files)
	}
	tool(t, nil, "mkfs.ext4", append(args, path)...)
}
