package e2e

import (
	"context"
	crand "crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"ditto.vm/internal/labtest"
	"ditto.vm/internal/material"
	"ditto.vm/migration/snapshot"
)

// shell types commands on a machine's console and reads what they print.
type shell struct {
	t testing.TB
	*machine
	at, typed int
}

// do types a line, waits until it is done and returns what came meanwhile, the
// echo of the line included.
func (s *shell) do(line string) string {
	s.t.Helper()
	s.typed++
	s.write(fmt.Sprintf(`%s; echo "do""ne %d"`+"\r", line, s.typed))
	from := s.at
	s.at = s.expect(s.t, s.at, fmt.Sprintf("done %d\r", s.typed))
	return s.String()[from:s.at]
}

func (s *shell) write(text string) {
	s.t.Helper()
	if _, err := s.stdin.WriteString(text); err != nil {
		s.t.Fatal(err)
	}
}

// powerOff ends the machine from inside.
func (s *shell) powerOff() {
	s.t.Helper()
	s.write("poweroff\r")
	if code := s.wait(s.t); code != 0 {
		s.t.Errorf("exit code %d:\n%s", code, s)
	}
}

// hexDigits are sums, nonces and boot IDs.
var hexDigits = regexp.MustCompile(`\b([0-9a-f]{64}|[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})\b`)

// sums returns the sums, nonces and boot IDs that a line prints.
func (s *shell) sums(line string) string {
	s.t.Helper()
	return strings.Join(hexDigits.FindAllString(s.do(line), -1), " ")
}

// folders are the places of one test: its environment has overlays of restored
// machines there too.
type folders struct {
	t    testing.TB
	env  []string
	work string
}

func newFolders(t testing.TB) folders {
	t.Helper()
	f := folders{t: t, env: environment(t), work: realFolder(t)}
	f.env = append(f.env, "XDG_DATA_HOME="+filepath.Join(f.work, "data"))
	return f
}

func (f folders) path(name string) string { return filepath.Join(f.work, name) }

// ditto runs a command that must work, and returns what it prints.
func (f folders) ditto(args ...string) string {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), guestLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, ditto(f.t), args...)
	cmd.Env = f.env
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		f.t.Fatalf("ditto %s: %v: %s%s", strings.Join(args, " "), err, out, &errs)
	}
	return string(out)
}

// saved is the last event of a save.
type saved struct {
	Event       string
	PauseMs     float64        `json:"pause_ms"`
	TookMs      float64        `json:"took_ms"`
	MemoryBytes uint64         `json:"memory_bytes"`
	StoredBytes uint64         `json:"stored_bytes"`
	Holds       snapshot.Holds `json:"holds"`
	Rounds      int
	Disks       []string
}

// save saves a machine, and verifies the snapshot.
func (f folders) save(machine, dir string, args ...string) (event saved) {
	f.t.Helper()
	lines := strings.Split(strings.TrimSpace(f.ditto(append([]string{"snapshot", machine, dir, "--json"}, args...)...)), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &event); err != nil || event.Event != "saved" {
		f.t.Fatalf("%v: %s", err, lines[len(lines)-1])
	}
	f.t.Logf("saved: %+v", event)
	f.ditto("snapshot", "verify", dir)
	return event
}

// randomDisk makes a disk with an ext4 file system labelled data that holds a
// file called random, and returns the file's SHA-256. Its blocks are as large as
// pages, which they are not by default on so small a disk.
func randomDisk(t testing.TB, disk string, size int64) string {
	t.Helper()
	content := disk + ".content"
	if err := os.Mkdir(content, 0o700); err != nil {
		t.Fatal(err)
	}
	file, err := os.Create(filepath.Join(content, "random"))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.New()
	_, err = io.CopyN(io.MultiWriter(file, sum), crand.Reader, size)
	if err := errors.Join(err, file.Close()); err != nil {
		t.Fatal(err)
	}
	command(t, "truncate", "-s", fmt.Sprint(size+size/4+(32<<20)), disk)
	command(t, "mkfs.ext4", "-q", "-F", "-b", "4096", "-L", "data", "-d", content, disk)
	if err := os.RemoveAll(content); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// checkDisk has QEMU's tools and e2fsck look at an overlay whose machine has
// ended: they find no fault, and a copy of it, which is returned, is the same
// disk.
func checkDisk(t testing.TB, overlay string) (flat string) {
	t.Helper()
	command(t, "qemu-img", "check", "-q", overlay)
	flat = overlay + ".raw"
	command(t, "qemu-img", "convert", "-O", "raw", overlay, flat)
	command(t, "qemu-img", "compare", "-q", overlay, flat)
	command(t, "e2fsck", "-fn", flat)
	return flat
}

// TestLinuxSnapshot: of a guest that has read a file from its disk, little more
// is stored than what it has made itself. Restored lazily and eagerly, it is the
// same guest, with the same bytes in memory and on its disk.
func TestLinuxSnapshot(t *testing.T) {
	labtest.Need(t)
	k, err := material.Kernel(t.Context(), material.CloudKernel, nil)
	if err != nil {
		t.Fatal(err)
	}
	cached, own := labtest.Count(32, 300), labtest.Count(8, 64)
	f := newFolders(t)
	disk := f.path("disk.img")
	sum := randomDisk(t, disk, int64(cached)<<20)
	m := &shell{t: t, machine: start(t, f.env, "run", "--name", "web", "-c", "2", "-m", "512M", "--net", "none",
		"--kernel", k.Image, "--disk", disk)}
	m.at = m.expect(t, 0, "ditto-init: ready")
	const identity = "cat /proc/sys/kernel/random/boot_id /tmp/nonce"
	const contents = "shasum -a 256 /mnt/data/random /tmp/own"
	const fromDisk = "shasum -a 256 /mnt/data/random"
	m.do("head -c 32 /dev/urandom | md5sum > /tmp/nonce")
	m.do(fmt.Sprintf("dd if=/dev/urandom of=/tmp/own bs=1048576 count=%d", own))
	id, sums := m.sums(identity), m.sums(contents)
	if len(strings.Fields(id)) != 2 || len(strings.Fields(sums)) != 2 || !strings.HasPrefix(sums, sum) {
		t.Fatalf("identity %q, sums %q, want %s first:\n%s", id, sums, sum, m)
	}
	snap := f.path("snap")
	event := f.save("web", snap, "--compress", "zstd")
	used := event.MemoryBytes - event.Holds.Zero
	beyond := int64(event.StoredBytes) - int64(own)<<20
	share := 100 * float64(beyond) / float64(used)
	// Per cent. Beside a small file the kernel and its programs count for more.
	limit := labtest.Count(25, 15)
	if share > float64(limit) {
		t.Errorf("stored %d bytes beyond the guest's own, of %d that are not zero: %.1f %%, want at most %d %%", beyond, used, share, limit)
	}
	if event.Holds.Blocks < uint64(cached)<<20*95/100 {
		t.Errorf("%d bytes have names of blocks; a file of %d MiB is cached", event.Holds.Blocks, cached)
	}
	// The machine that was saved goes on, and what it writes is its own.
	m.do("cat /tmp/own > /mnt/data/more; rm /mnt/data/random; sync")
	if got := m.sums(identity); got != id {
		t.Errorf("after the save the guest is %s, before %s", got, id)
	}
	m.powerOff()
	checkDisk(t, event.Disks[0])
	for _, mode := range []string{"lazy", "eager"} {
		args := []string{"restore", snap, "--name", mode, "--overlay-dir", f.path("overlays")}
		if mode != "lazy" {
			args = append(args, "--"+mode)
		}
		r := &shell{t: t, machine: start(t, f.env, args...)}
		r.write("\r")
		if got := r.sums(identity); got != id {
			t.Errorf("%s: the guest is %s, want %s:\n%s", mode, got, id, r)
		}
		if got := r.sums(contents); got != sums {
			t.Errorf("%s: SHA-256 in memory %s, want %s", mode, got, sums)
		}
		r.do("echo 3 > /proc/sys/vm/drop_caches")
		if got := r.sums(fromDisk); got != sum {
			t.Errorf("%s: SHA-256 from the disk %s, want %s", mode, got, sum)
		}
		r.powerOff()
		checkDisk(t, filepath.Join(f.path("overlays"), mode, "blk0.qcow2"))
	}
	f.ditto("snapshot", "verify", snap)
	if !t.Failed() {
		labtest.Proof(t, "snapshot-linux", "a guest of 512 MiB caches a file of %d MiB and holds %d MiB of its own: %.0f MiB stored, beyond the latter %.1f %% of the %.0f MiB that are not zero; restored lazily and eagerly: equal SHA-256 of both, the same boot_id and nonce",
			cached, own, float64(event.StoredBytes)/(1<<20), share, float64(used)/(1<<20))
	}
}
