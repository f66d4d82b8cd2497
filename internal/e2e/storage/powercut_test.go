package storage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"ditto.vm/internal/lab"
	"ditto.vm/internal/labtest"
)

// cutDisk is a guest's disk in a power cut. Each image lies on a file system
// of its own: flushing one file makes others on the same journal stable, too.
type cutDisk struct {
	cache string
	kind  rune // r: records on the disk itself, f: in a file on ext4
}

var cutDisks = []cutDisk{{"writeback", 'r'}, {"none", 'r'}, {"writethrough", 'r'}, {"writeback", 'f'}, {"none", 'f'}}

const (
	imageName = "disk.img"
	imageSize = 64 << 20
	outerSize = 160 << 20
)

// Each round boots a lab and a guest, and cuts the power when so many batches
// have been acknowledged.
const minAcks, maxAcks = 20, 400

// needLabs skips unless this process may boot labs.
func needLabs(t *testing.T) {
	t.Helper()
	if os.Getenv(labtest.EnvInside) == "1" {
		t.Skip("boots emulated hosts, and this is one; try: make test, outside")
	}
	if os.Getenv("DITTO_LAB_BOOT") != "1" && os.Getenv(labtest.EnvProve) != "1" {
		t.Skip("boots emulated hosts; try: make lab-test, or set DITTO_LAB_BOOT=1")
	}
}

// TestBootPowerCut kills the emulated host at random points while a guest
// writes. What the guest was told is flushed must be there, on raw disks and
// through a file system, which must be whole.
func TestBootPowerCut(t *testing.T) {
	needLabs(t)
	c := newCutter(t, "")
	rounds := labtest.Count(2, 20)
	var records uint64
	for i := range rounds {
		seed := rand.Uint64() >> 1
		acked, missing := c.round(t, seed)
		for _, n := range acked {
			records += n
		}
		for _, m := range missing {
			t.Errorf("round %d, seed %d: %s", i, seed, m)
		}
		t.Logf("round %d: acknowledged %v", i, acked)
	}
	labtest.Proof(t, "power-cut", "%d power cuts, %d flushed records on %d disks, none lost", rounds, records, len(cutDisks))
}

// TestBootPowerCutWithoutFsync shows that TestBootPowerCut can fail: without
// ditto's flushes every disk loses records that the guest had flushed.
func TestBootPowerCutWithoutFsync(t *testing.T) {
	needLabs(t)
	c := newCutter(t, withoutFsync(t))
	acked, missing := c.round(t, 1)
	for i, d := range cutDisks {
		prefix := fmt.Sprintf("disk %d ", i)
		n := 0
		for _, m := range missing {
			if strings.HasPrefix(m, prefix) {
				n++
			}
		}
		if n == 0 {
			t.Errorf("disk %d (%s, %c) lost nothing of %d records without a flush", i, d.cache, d.kind, acked[i])
		}
		t.Logf("disk %d (%s, %c): %d records acknowledged, %d losses", i, d.cache, d.kind, acked[i], n)
	}
}

// TestFlushesAreKnown: the places where ditto flushes are where withoutFsync
// looks for them.
func TestFlushesAreKnown(t *testing.T) {
	t.Setenv("CGO_ENABLED", "0")
	tool(t, nil, "go", "-C", "../../..", "build", "-o", os.DevNull, "-overlay", withoutFsync(t), "./images/disk")
	tool(t, nil, "go", "-C", "../../..", "build", "-o", os.DevNull, "-overlay", withoutSaveFsync(t), "./migration/snapshot")
}

// withoutFsync writes a build overlay in which ditto never asks the kernel to
// make anything stable, and believes it was done.
func withoutFsync(t *testing.T) string {
	t.Helper()
	return overlayOf(t, "../../../images/disk", map[string][][2]string{
		"ring.go":  {{"r.entry(ringOpFsync, file, token, 0, 0, 0, fsyncDatasync)", "r.entry(ringOpRead, file, token, 0, 0, 0, 0)"}},
		"queue.go": {{"flags = unix.RWF_DSYNC", "flags = 0"}},
		"raw.go":   {{"flags = unix.RWF_DSYNC", "flags = 0"}, {"err := unix.Fdatasync(r.fd)", "err := error(nil)"}},
	})
}

// overlayOf writes a build overlay in which texts of a package, which stand there
// once, are replaced.
func overlayOf(t *testing.T, pkg string, files map[string][][2]string) string {
	t.Helper()
	source, err := filepath.Abs(pkg)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	replace := map[string]string{}
	for name, edits := range files {
		b, err := os.ReadFile(filepath.Join(source, name))
		if err != nil {
			t.Fatal(err)
		}
		text := string(b)
		for _, e := range edits {
			if strings.Count(text, e[0]) != 1 {
				t.Fatalf("%s does not hold %q once: this test no longer knows where ditto flushes", name, e[0])
			}
			text = strings.Replace(text, e[0], e[1], 1)
		}
		changed := filepath.Join(dir, name)
		if err := os.WriteFile(changed, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		replace[filepath.Join(source, name)] = changed
	}
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	overlay := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(overlay, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return overlay
}

// cutter runs rounds with one build of ditto.
type cutter struct {
	dir, ditto string
	guest      guestImages
	pristine   string // an empty file system for a guest
}

func newCutter(t *testing.T, overlay string) *cutter {
	t.Helper()
	dir := t.TempDir()
	c := &cutter{dir: dir, ditto: filepath.Join(dir, "ditto"), guest: newGuest(t, dir)}
	args := []string{"-C", "../../..", "build", "-o", c.ditto}
	if overlay != "" {
		args = append(args, "-overlay", overlay)
	}
	t.Setenv("CGO_ENABLED", "0")
	tool(t, nil, "go", append(args, "./cmd/ditto")...)
	c.pristine = filepath.Join(dir, "pristine")
	mkfs(t, c.pristine, imageSize, "")
	return c
}

// script is what runs in the lab. Its kernel writes nothing back by itself, so
// that what is kept was flushed; ditto's output is the guest's console.
const script = `set -e
echo 0 > /proc/sys/vm/dirty_writeback_centisecs
i=0
while [ -e /dev/lab/disk$i ]; do
	mkdir /cut$i
	mount -t ext4 -o commit=600 /dev/lab/disk$i /cut$i
	i=$((i+1))
done
exec "$@"
`

// round boots a lab and a guest, cuts the power at a point that seed decides,
// and returns what was acknowledged by disk, and what of it is missing.
func (c *cutter) round(t *testing.T, seed uint64) (acked []uint64, missing []string) {
	t.Helper()
	dir := t.TempDir()
	outers, kinds := c.makeDisks(t, dir)
	ctx, cancel := context.WithTimeout(t.Context(), guestLimit)
	defer cancel()
	l, err := lab.Start(ctx, lab.Options{MemoryMiB: 2048, DiskBytes: 64 << 20, Disks: outers})
	if err != nil {
		t.Fatal(err)
	}
	console := newAcks(seed, len(cutDisks))
	ended := make(chan error, 1)
	defer func() {
		l.Kill()
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	args := c.guest.args(map[string]string{"name": "powercut", "seed": strconv.FormatUint(seed, 10), "disks": kinds}, c.diskFlags()...)
	go func() {
		_, err := l.Run(ctx, &lab.Cmd{
			Args:   append([]string{"sh", "-c", script, "sh", c.ditto}, append(args, "--cpus", "2")...),
			Stdout: console, Stderr: console,
		})
		ended <- err
	}()

	rng := rand.New(rand.NewPCG(seed, 0))
	target := minAcks + rng.IntN(maxAcks-minAcks)
	for {
		count, all, err := console.state()
		if err != nil {
			t.Fatal(err)
		}
		if all && count >= target {
			break
		}
		select {
		case <-console.more:
		case err := <-ended:
			t.Fatalf("the guest ended before the power was cut: %v\n%s", err, console)
		}
	}
	// Somewhere between two acknowledgements, not at one.
	<-time.After(time.Duration(rng.Int64N(int64(50 * time.Millisecond))))
	l.Kill()
	if err := <-ended; !errors.Is(err, lab.ErrDead) {
		t.Errorf("the guest after the cut: %v, want %v", err, lab.ErrDead)
	}
	if _, _, err := console.state(); err != nil {
		t.Fatal(err)
	}
	acked = console.seen()
	for i, outer := range outers {
		for _, m := range c.inspect(t, dir, i, outer, seed, acked[i]) {
			missing = append(missing, fmt.Sprintf("disk %d (%s, %c): %s", i, cutDisks[i].cache, cutDisks[i].kind, m))
		}
	}
	return acked, missing
}

// makeDisks makes the lab's disks: file systems that hold a guest's disk each.
func (c *cutter) makeDisks(t *testing.T, dir string) (outers []string, kinds string) {
	t.Helper()
	for i, d := range cutDisks {
		files := filepath.Join(dir, fmt.Sprintf("files%d", i))
		if err := os.Mkdir(files, 0o755); err != nil {
			t.Fatal(err)
		}
		image := filepath.Join(files, imageName)
		if d.kind == 'f' {
			tool(t, nil, "cp", "--sparse=always", c.pristine, image)
		} else {
			sparse(t, image, imageSize)
		}
		outer := filepath.Join(dir, fmt.Sprintf("outer%d", i))
		mkfs(t, outer, outerSize, files)
		outers = append(outers, outer)
		kinds += string(d.kind)
	}
	return outers, kinds
}

// diskFlags are the guest's disks in the lab.
func (c *cutter) diskFlags() []string {
	var flags []string
	for i, d := range cutDisks {
		flags = append(flags, fmt.Sprintf("/cut%d/%s,cache=%s", i, imageName, d.cache))
	}
	return flags
}

// inspect returns what is missing on one of the lab's disks, after the journals
// have been replayed as a boot would.
func (c *cutter) inspect(t *testing.T, dir string, disk int, outer string, seed, acked uint64) []string {
	t.Helper()
	const corrected = 1
	tool(t, []int{corrected}, "e2fsck", "-p", "-E", "journal_only", outer)
	image := filepath.Join(dir, fmt.Sprintf("image%d", disk))
	tool(t, nil, "debugfs", "-R", "dump /"+imageName+" "+image, outer)
	content, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	if cutDisks[disk].kind == 'r' {
		return lost(content, seed, disk, acked)
	}
	if code, out := try(t, "e2fsck", "-p", "-E", "journal_only", image); code > corrected {
		return []string{fmt.Sprintf("the guest's journal cannot be replayed: status %d: %s", code, out)}
	}
	if code, out := try(t, "e2fsck", "-fn", image); code != 0 {
		return []string{fmt.Sprintf("the guest's file system is broken: status %d: %s", code, out)}
	}
	file := filepath.Join(dir, fmt.Sprintf("file%d", disk))
	tool(t, nil, "debugfs", "-R", "dump /"+recordFile+" "+file, image)
	content, err = os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return []string{"the file is not there"}
	}
	if err != nil {
		t.Fatal(err)
	}
	return lost(content, seed, disk, acked)
}
