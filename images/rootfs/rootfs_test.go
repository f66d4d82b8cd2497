package rootfs

import (
	"context"
	"encoding/base64"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestOptionsRejects(t *testing.T) {
	for name, o := range map[string]Options{
		"package":  {Packages: []string{"fio; rm -rf /"}},
		"option":   {Packages: []string{"-o"}},
		"kernel":   {Kernel: "../x"},
		"label":    {Label: "two words"},
		"hostname": {Hostname: "-x"},
		"args":     {KernelArgs: "a'b"},
		"password": {RootPassword: "a\nb"},
	} {
		o.CacheDir = t.TempDir()
		if _, err := Debian(context.Background(), o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	ok := Options{Packages: []string{"fio", "g++", "linux-image-cloud-amd64/bookworm-backports", "fio=3.33-3", "libc6:i386"}, Hostname: "g-1"}
	if err := ok.complete(); err != nil {
		t.Error(err)
	}
}

func TestKeysDiffer(t *testing.T) {
	seen := map[string]bool{}
	for _, o := range []Options{
		{}, {Packages: []string{"fio"}}, {Kernel: "linux-image-amd64"}, {Label: "x"}, {Hostname: "x"},
		{RootPassword: "x"}, {Autologin: true}, {SizeBytes: 1 << 30}, {KernelArgs: "console=hvc0"},
	} {
		if err := o.complete(); err != nil {
			t.Fatal(err)
		}
		if k := o.key(); seen[k] {
			t.Errorf("%+v has the key of another", o)
		} else {
			seen[k] = true
		}
	}
	a, b := Options{Packages: []string{"fio", "iperf3"}}, Options{Packages: []string{"iperf3", "fio"}}
	if a.key() != b.key() {
		t.Error("the order of packages changes the key")
	}
}

// fakeRoot is what configure needs of a root file system.
func fakeRoot(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range map[string]string{
		"etc/shadow":           "root:*:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\n",
		"boot/vmlinuz-6.1.0-x": "kernel", "boot/initrd.img-6.1.0-x": "initrd",
	} {
		if err := writeFile(root, file{name, 0o644, text}); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestConfigure(t *testing.T) {
	root := fakeRoot(t)
	o := Options{Kernel: "linux-image-cloud-amd64", Autologin: true}
	if err := o.complete(); err != nil {
		t.Fatal(err)
	}
	release, err := o.configure(context.Background(), root)
	if err != nil || release != "6.1.0-x" {
		t.Fatalf("release %q, err %v", release, err)
	}
	for name, want := range map[string]string{
		"etc/shadow": "root::19000:0:99999:7:::\ndaemon:*:", "etc/hostname": "debian\n", "etc/fstab": "LABEL=rootfs / ext4",
		"boot/grub/grub.cfg": "linux /boot/vmlinuz-6.1.0-x root=LABEL=rootfs ro quiet console=ttyS0\n",
		"etc/systemd/system/serial-getty@.service.d/autologin.conf": "--autologin root",
	} {
		b, err := os.ReadFile(filepath.Join(root, name))
		if err != nil || !strings.Contains(string(b), want) {
			t.Errorf("%s: %v, %q lacks %q", name, err, b, want)
		}
	}
	for link := range wantedUnits() {
		if _, err := os.Readlink(filepath.Join(root, "etc/systemd/system", link)); err != nil {
			t.Error(err)
		}
	}
	// Twice is as good as once.
	if _, err := o.configure(context.Background(), root); err != nil {
		t.Error(err)
	}
}

// TestWriteFileStaysInside: packages may put a link where a file is written.
func TestWriteFileStaysInside(t *testing.T) {
	root, outside := t.TempDir(), filepath.Join(t.TempDir(), "host")
	if err := os.WriteFile(outside, []byte("host's"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := symlink(outside, filepath.Join(root, "etc/hostname")); err != nil {
		t.Fatal(err)
	}
	if err := writeFile(root, file{"etc/hostname", 0o644, "guest\n"}); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(outside); string(b) != "host's" {
		t.Error("a file of the host was written through a link")
	}
}

// TestRunScript runs the guest's script against a command line, with the
// programs that touch the machine replaced.
func TestRunScript(t *testing.T) {
	if _, err := exec.LookPath("bash"); err != nil {
		t.Skip("needs bash")
	}
	command := `echo "it's" 'fine' $((6*7)); exit 3`
	for name, tc := range map[string]struct{ cmdline, out, action string }{
		"base64":  {"quiet ditto.run64=" + base64.RawURLEncoding.EncodeToString([]byte(command)), "it's fine 42", "poweroff"},
		"quoted":  {`root=/dev/vda ditto.run="echo two words; exit 3" ditto.after=reboot`, "two words", "reboot"},
		"quotes":  {`ditto.run="echo a'b'c; exit 3"  ditto.after=shell`, "abc", ""},
		"hostile": {`ditto.run="echo x; exit 3" ditto.after=$(touch${IFS}pwned)`, "x", "poweroff"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			cmdline := filepath.Join(dir, "cmdline")
			if err := os.WriteFile(cmdline, []byte(tc.cmdline+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			script := strings.NewReplacer("/proc/cmdline", cmdline, "cd /root", "cd "+dir, "exec systemctl", "echo systemctl").Replace(runScript)
			cmd := exec.Command("sh", "-c", script)
			cmd.Dir = dir
			b, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, b)
			}
			out := string(b)
			for _, want := range []string{"ditto-init: ready uptime=", tc.out + "\n", "ditto-init: exit status=3 seconds="} {
				if !strings.Contains(out, want) {
					t.Errorf("output lacks %q:\n%s", want, out)
				}
			}
			if got := strings.Contains(out, "systemctl --no-block"); got != (tc.action != "") || !strings.Contains(out, tc.action) {
				t.Errorf("want action %q:\n%s", tc.action, out)
			}
			if _, err := os.Stat(filepath.Join(dir, "pwned")); err == nil {
				t.Error("a word of the command line was executed")
			}
		})
	}
}

func TestBuildStops(t *testing.T) {
	if !isRoot() {
		if _, err := Debian(context.Background(), Options{CacheDir: t.TempDir()}); !errors.Is(err, ErrNeedsRoot) {
			t.Errorf("got %v, want ErrNeedsRoot", err)
		}
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	dir := t.TempDir()
	if _, err := Debian(ctx, Options{CacheDir: dir}); err == nil {
		t.Error("a cancelled build succeeded")
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "rootfs/[a-z0-9]*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
