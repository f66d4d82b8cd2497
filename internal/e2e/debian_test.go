package e2e

import (
	"strings"
	"testing"

	"ditto.vm/internal/labtest"
	"ditto.vm/internal/material"
)

// workload is what apt-installed tools do in the guest, each with a result to
// look for.
const workload = `set -e
fio --name=t --filename=/var/tmp/f --size=8M --rw=randrw --bs=4k --direct=1 --verify=crc32c --do_verify=1 --minimal > /tmp/fio && echo "fio ""verified"
ip link set lo up; iperf3 -s -1 -D; for i in 1 2 3 4 5 6 7 8 9 10; do iperf3 -c 127.0.0.1 -n 1M > /tmp/iperf && break; sleep 1; done; grep -q receiver /tmp/iperf && echo "iperf3 ""received"
stress-ng --vm 1 --vm-bytes 16M --vm-ops 200 --verify --quiet && echo "stress-ng ""verified"`

// TestLinuxDebianRuns boots a Debian root file system with the kernel and the
// u-root image, which switches to it, and runs tools from Debian's archive.
func TestLinuxDebianRuns(t *testing.T) {
	labtest.Need(t)
	k, err := material.Kernel(t.Context(), material.CloudKernel, nil)
	if err != nil {
		t.Fatal(err)
	}
	image, err := material.Debian(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	disk := copyDisk(t, image.Path)
	m := start(t, environment(t), "run", "-c", "2", "-m", "512M", "--net", "none",
		"--kernel", k.Image, "--disk", disk, "--append", "root=LABEL=rootfs")
	at := m.expect(t, 0, "login:")
	if _, err := m.stdin.WriteString("root\r"); err != nil {
		t.Fatal(err)
	}
	at = m.expect(t, at, "# ")
	for _, line := range strings.Split(workload, "\n") {
		if _, err := m.stdin.WriteString(line + "\r"); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{"fio verified", "iperf3 received", "stress-ng verified"} {
		at = m.expect(t, at, want)
	}
	if _, err := m.stdin.WriteString("poweroff\r"); err != nil {
		t.Fatal(err)
	}
	if code := m.wait(t); code != 0 {
		t.Errorf("exit code %d:\n%s", code, m)
	}
}

// TestLinuxDebianByKexec lets u-root's boot command find the kernel on the
// disk and start it by kexec.
func TestLinuxDebianByKexec(t *testing.T) {
	labtest.Need(t)
	image, err := material.Debian(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	k, err := material.Kernel(t.Context(), material.CloudKernel, nil)
	if err != nil {
		t.Fatal(err)
	}
	m := start(t, environment(t), "run", "-c", "2", "-m", "768M", "--net", "none",
		"--kernel", k.Image, "--disk", copyDisk(t, image.Path), "--append", "ditto.mount=off")
	at := m.expect(t, 0, "ditto-init: ready")
	if _, err := m.stdin.WriteString("uname -r; boot -v\r"); err != nil {
		t.Fatal(err)
	}
	at = m.expect(t, at, "login:")
	if _, err := m.stdin.WriteString("root\r"); err != nil {
		t.Fatal(err)
	}
	at = m.expect(t, at, "# ")
	if _, err := m.stdin.WriteString("echo running $(uname -r)\r"); err != nil {
		t.Fatal(err)
	}
	m.expect(t, at, "running "+image.Release)
	// At once: TestLinuxDebianRuns stops Debian's services one by one.
	if _, err := m.stdin.WriteString("poweroff -f\r"); err != nil {
		t.Fatal(err)
	}
	if code := m.wait(t); code != 0 {
		t.Errorf("exit code %d:\n%s", code, m)
	}
}
