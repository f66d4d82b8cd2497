package e2e

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"ditto.vm/internal/labtest"
	"ditto.vm/internal/material"
)

// The bridge of the clones.
const (
	cloneBridge = "ditto-e2e2"
	cloneHost   = "10.79.0.1"
	// cloneNoticed is what Linux says when its generation ID changes.
	cloneNoticed = "crng reseeded due to virtual machine fork"
)

func cloneAddress(i int) string { return fmt.Sprintf("10.79.0.%d", 11+i) }

// TestLinuxClonesOnABridge: two clones of one snapshot share a bridge. Each has a
// name, a MAC address, a console, a generation ID and an overlay of its own; with
// addresses of their own both are reached, and each reads what it wrote itself.
func TestLinuxClonesOnABridge(t *testing.T) {
	labtest.Need(t)
	k, err := material.Kernel(t.Context(), material.CloudKernel, nil)
	if err != nil {
		t.Fatal(err)
	}
	bridge(t, cloneBridge, cloneHost+"/24")
	f := newFolders(t)
	disk := f.path("disk.img")
	randomDisk(t, disk, 1<<20)
	m := &shell{t: t, machine: start(t, f.env, "run", "--name", "web", "-c", "1", "-m", "256M", "--kernel", k.Image,
		"--net", "tap,bridge="+cloneBridge, "--disk", disk, "--append", "ditto.net=eth0,"+cloneAddress(100)+"/24")}
	m.at = m.expect(t, 0, "ditto-init: ready")
	const mac = "cat /sys/class/net/eth0/address"
	const identity = "cat /proc/sys/kernel/random/boot_id"
	id, saved := m.sums(identity), macAddress.FindString(m.do(mac))
	snap := f.path("snap")
	f.save("web", snap, "--stop")
	if code := m.wait(t); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, m)
	}
	const n = 2
	var rows []struct{ Name, Error string }
	if err := json.Unmarshal([]byte(f.ditto("clone", snap, "-n", fmt.Sprint(n), "--name", "c", "--keep", "--json",
		"--overlay-dir", f.path("overlays"))), &rows); err != nil || len(rows) != n {
		t.Fatalf("%v: %+v", err, rows)
	}
	macs := map[string]bool{saved: true}
	var clones []*shell
	for i, row := range rows {
		t.Cleanup(func() {
			stop := exec.Command(ditto(t), "stop", "--grace", "0s", row.Name)
			stop.Env = f.env
			_ = stop.Run()
		})
		c := &shell{t: t, machine: start(t, f.env, "console", row.Name)}
		clones = append(clones, c)
		c.write("\r")
		if got := c.sums(identity); got != id {
			t.Errorf("%s has boot_id %s, want %s", row.Name, got, id)
		}
		if !strings.Contains(c.do("dmesg"), cloneNoticed) {
			t.Errorf("%s did not notice that it is another:\n%s", row.Name, c)
		}
		// The driver reads the device's address when it starts.
		c.do("d=$(basename $(readlink /sys/class/net/eth0/device)); for w in unbind bind; do echo $d > /sys/bus/virtio/drivers/virtio_net/$w; done")
		c.do("ip addr add " + cloneAddress(i) + "/24 dev eth0; ip link set eth0 up")
		own := macAddress.FindString(c.do(mac))
		if own == "" || macs[own] {
			t.Errorf("%s has MAC address %q, and these are taken: %v", row.Name, own, macs)
		}
		macs[own] = true
	}
	for i, c := range clones {
		c.do(fmt.Sprintf("echo written by clone %d > /mnt/data/own; sync; echo 3 > /proc/sys/vm/drop_caches", i))
	}
	for i, c := range clones {
		c.write("cat /mnt/data/own | netcat -l 0.0.0.0 7000\r")
		want := fmt.Sprintf("written by clone %d\n", i)
		if got := dialUntil(t, c.machine, cloneAddress(i)+":7000"); got != want {
			t.Errorf("%s says %q, want %q", rows[i].Name, got, want)
		}
		c.do("true")
		c.write("poweroff\r")
		<-c.done
	}
	for i, row := range rows {
		flat := checkDisk(t, filepath.Join(f.path("overlays"), row.Name, "blk0.qcow2"))
		out, err := exec.CommandContext(t.Context(), "debugfs", "-R", "cat /own", flat).Output()
		if want := fmt.Sprintf("written by clone %d\n", i); err != nil || string(out) != want {
			t.Errorf("on the disk of %s: %q, %v, want %q", row.Name, out, err, want)
		}
	}
	f.ditto("snapshot", "verify", snap)
	if !t.Failed() {
		labtest.Proof(t, "clones-bridge", "%d clones on one bridge: %d MAC addresses, each told of its new generation ID, each reached at its own address, each overlay whole and with what its clone wrote", n, len(macs)-1)
	}
}

var macAddress = regexp.MustCompile(`\b[0-9a-f]{2}(:[0-9a-f]{2}){5}\b`)
