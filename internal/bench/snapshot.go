package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// The guest that is saved: it holds files of random bytes in its page cache.
const (
	anchorMemoryMiB = 1024
	anchorFiles     = 40
	anchorFileMiB   = 10
	// anchorQuiet is how long it idles before the first save: long enough for
	// the names of its pages to be proven.
	anchorQuiet = 45 * time.Second
	// restoredIdle is how long a restored guest ticks before its memory is
	// measured.
	restoredIdle = 3 * time.Second
	// channels of QEMU's multifd.
	anchorChannels = 4
)

// snapshotAnchor saves a running guest to files and restores it.
func snapshotAnchor() Benchmark {
	const stored, took, pause, tick, resident = "stored", "save", "pause", "next-tick", "resident"
	return Benchmark{
		Name: "snapshot-anchor",
		Title: fmt.Sprintf("Saving and restoring a guest of %d MiB (Debian kernel, busybox initramfs) that has read %d files of %d MiB and prints a dot each millisecond",
			anchorMemoryMiB, anchorFiles, anchorFileMiB),
		Where: Lab, LabCPUs: 1, Rounds: 5, Warmups: 1,
		OpenLimit: 10 * time.Minute, RunLimit: 5 * time.Minute,
		Metrics: []Metric{
			{stored, "MiB", Lower, "what the snapshot's files take of the disk, disk images and their overlays apart"},
			{took, "s", Lower, "the save, from request to done"},
			{pause, "ms", Lower, "for how long the guest stood still, as the VMM says"},
			{tick, "s", Lower, "exec of the VMM that restores to the guest's next dot"},
			{resident, "MiB", Lower, fmt.Sprintf("guest memory resident in the restored VMM after %s", restoredIdle)},
		},
		Targets: []Target{
			{stored, nameDitto, nameQEMU, 0.13},
			{stored, nameDittoZstd, nameQEMU, 0.025},
			{took, nameDitto, nameQEMU, 0.30},
			{pause, nameDitto, "", 50},
			{tick, nameDitto, nameQEMU, 0.10},
			{resident, nameDitto, nameQEMU, 0.25},
		},
		Open: openAnchor,
	}
}

const nameDittoZstd = "ditto-zstd"

// anchorSession holds the running guests.
type anchorSession struct {
	*pair
	env   *Env
	dir   string
	specs []spec
	vms   []anchorVM
	round int
}

// anchorVM saves a guest and restores it, with one VMM.
type anchorVM interface {
	// save saves the running guest of the session, which stands still then.
	save(ctx context.Context, snapshot string) (Sample, error)
	// restore starts a VMM that goes on from the snapshot.
	restore(ctx context.Context, snapshot string) (*child, error)
	// restored is called when that VMM is gone, and lets the saved guest run on.
	restored(ctx context.Context) error
	// resident is the guest memory of the restored VMM, in bytes.
	resident(c *child) (uint64, error)
}

func openAnchor(ctx context.Context, env *Env) (_ Session, err error) {
	if err := needAnchor(env); err != nil {
		return nil, err
	}
	s := &anchorSession{env: env}
	if s.dir, err = os.MkdirTemp(env.Scratch, "anchor-"); err != nil {
		return nil, err
	}
	clean := func() error { return os.RemoveAll(s.dir) }
	initrd, files, err := makeAnchor(ctx, env, s.dir)
	if err != nil {
		return nil, errors.Join(err, clean())
	}
	var cmds []launch
	for i, name := range []string{nameDitto, nameDittoZstd, nameQEMU} {
		disk := filepath.Join(s.dir, name+".qcow2")
		if err := overlayOn(ctx, files, disk); err != nil {
			return nil, errors.Join(err, clean())
		}
		g := anchorGuest(env, initrd, disk)
		s.specs = append(s.specs, g)
		if name == nameQEMU {
			vm := &qemuAnchor{s: s, i: i, socket: filepath.Join(s.dir, "qmp")}
			cmds = append(cmds, launch{name, append(qemuArgs(env.QEMU, qemuQ35(), g), "-qmp", "unix:"+vm.socket+",server=on,wait=off")})
			s.vms = append(s.vms, vm)
			continue
		}
		vm := &dittoAnchor{s: s, name: name}
		if name == nameDittoZstd {
			vm.flags = []string{"--compress", "zstd"}
		}
		cmds = append(cmds, launch{name, append(dittoArgs(env.Ditto, g), "--name", name)})
		s.vms = append(s.vms, vm)
	}
	if s.pair, err = openPair(ctx, cmds, clean); err != nil {
		return nil, errors.Join(err, clean())
	}
	if err := prepareAnchor(ctx, s.pair); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// makeAnchorFiles makes an ext4 image with the files.
func makeAnchorFiles(ctx context.Context, image string) error {
	dir := image + ".d"
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	for i := range anchorFiles {
		if err := fillFile(filepath.Join(dir, fmt.Sprintf("%02d", i)), anchorFileMiB<<20); err != nil {
			return err
		}
	}
	_, err := output(ctx, "mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", dir, image, fmt.Sprintf("%dM", anchorFiles*anchorFileMiB+64))
	return err
}

// prepareAnchor lets every guest read its files, and waits.
func prepareAnchor(ctx context.Context, p *pair) error {
	for i, g := range p.guests {
		if err := readFiles(ctx, g, "/dev/vda"); err != nil {
			return fmt.Errorf("%s: %w", p.cmds[i].name, err)
		}
	}
	return anchorRest(ctx)
}

// readFiles lets a guest read its files, which are on a disk.
func readFiles(ctx context.Context, g *shellGuest, disk string) error {
	for _, line := range []string{"mkdir -p /tmp/d", "mount -t ext4 " + disk + " /tmp/d", "cat /tmp/d/[0-9]* > /dev/null", "sync"} {
		if _, err := g.run(ctx, line); err != nil {
			return err
		}
	}
	return nil
}

// anchorRest waits while guests idle.
func anchorRest(ctx context.Context) error {
	select {
	case <-time.After(anchorQuiet):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Run implements [Session].
func (s *anchorSession) Run(ctx context.Context, i int) (sample Sample, err error) {
	s.round++
	g, vm := s.guests[i], s.vms[i]
	snapshot := filepath.Join(s.dir, fmt.Sprintf("snapshot-%d", s.round))
	if _, err := g.run(ctx, anchorTick+" & sleep 0.1"); err != nil {
		return nil, err
	}
	if sample, err = vm.save(ctx, snapshot); err != nil {
		return nil, fmt.Errorf("save: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(snapshot)) }()
	bytes, err := diskUsage(snapshot)
	if err != nil {
		return nil, err
	}
	sample["stored"] = float64(bytes) / (1 << 20)
	if err := s.restore(ctx, vm, snapshot, sample); err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	if err := vm.restored(ctx); err != nil {
		return nil, err
	}
	// The shell says when the dots have ended.
	_, err = g.run(ctx, "kill $!; wait $! || true")
	return sample, err
}

// restore measures a restore and ends what it started.
func (s *anchorSession) restore(ctx context.Context, vm anchorVM, snapshot string, sample Sample) error {
	c, err := vm.restore(ctx, snapshot)
	if err != nil {
		return err
	}
	defer c.stop()
	_, at, err := c.waitFor(ctx, 0, ".")
	if err != nil {
		return err
	}
	sample["next-tick"] = at.Sub(c.started).Seconds()
	select {
	case <-time.After(restoredIdle):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	bytes, err := vm.resident(c)
	sample["resident"] = float64(bytes) / (1 << 20)
	return err
}

// diskUsage is what the files of a folder, or a file, take of the disk.
func diskUsage(path string) (bytes uint64, err error) {
	err = filepath.WalkDir(path, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return &fs.PathError{Op: "lstat", Path: path, Err: err}
		}
		bytes += uint64(st.Blocks) * 512
		return nil
	})
	return bytes, err
}

// dittoAnchor is ditto's part.
type dittoAnchor struct {
	s     *anchorSession
	name  string
	flags []string // of the save
}

const restoredName = "restored"

func (d *dittoAnchor) save(ctx context.Context, snapshot string) (Sample, error) {
	start := time.Now()
	out, err := output(ctx, append([]string{d.s.env.Ditto, "snapshot", d.name, snapshot, "--json"}, d.flags...)...)
	took := time.Since(start)
	if err != nil {
		return nil, err
	}
	report, err := parseSaveReport(out)
	if err != nil {
		return nil, err
	}
	// QEMU's guest stands still after a save. This one is not to take the CPU from
	// the one that is restored either.
	_, err = output(ctx, d.s.env.Ditto, "pause", d.name)
	return Sample{"save": took.Seconds(), "pause": *report.PauseMs}, err
}

func (d *dittoAnchor) restore(_ context.Context, snapshot string) (*child, error) {
	return startChild([]string{d.s.env.Ditto, "restore", snapshot, "--name", restoredName, "--overlay-dir", snapshot + ".overlays"}, false)
}

func (d *dittoAnchor) restored(ctx context.Context) error {
	_, err := output(ctx, d.s.env.Ditto, "resume", d.name)
	return err
}

func (d *dittoAnchor) resident(*child) (uint64, error) {
	out, err := exec.Command(d.s.env.Ditto, "stats", "--json", restoredName).Output()
	if err != nil {
		return 0, fmt.Errorf("ditto stats: %w", err)
	}
	var stats struct {
		Guest uint64 `json:"guest_resident_bytes"`
	}
	return stats.Guest, json.Unmarshal(out, &stats)
}

// qemuAnchor is QEMU's.
type qemuAnchor struct {
	s      *anchorSession
	i      int
	socket string
}

func (q *qemuAnchor) save(ctx context.Context, snapshot string) (Sample, error) {
	monitor, err := dialQMP(ctx, q.socket)
	if err != nil {
		return nil, err
	}
	defer func() { _ = monitor.Close() }()
	if err := monitor.fastFile(anchorChannels); err != nil {
		return nil, err
	}
	start := time.Now()
	if err := monitor.do("migrate", map[string]any{"uri": "file:" + snapshot}, nil); err != nil {
		return nil, err
	}
	m, err := monitor.migrated(ctx)
	return Sample{"save": time.Since(start).Seconds(), "pause": m.Downtime}, err
}

func (q *qemuAnchor) restore(ctx context.Context, snapshot string) (*child, error) {
	socket := q.socket + ".restored"
	args := append(qemuArgs(q.s.env.QEMU, qemuQ35(), q.s.specs[q.i]), "-qmp", "unix:"+socket+",server=on,wait=off", "-incoming", "defer")
	c, err := startChild(args, false)
	if err != nil {
		return nil, err
	}
	monitor, err := dialQMP(ctx, socket)
	if err == nil {
		defer func() { _ = monitor.Close() }()
		err = monitor.fastFile(anchorChannels)
	}
	if err == nil {
		err = monitor.do("migrate-incoming", map[string]any{"uri": "file:" + snapshot}, nil)
	}
	if err != nil {
		err = c.explain(err)
		c.stop()
		return nil, err
	}
	return c, nil
}

// restored lets the saved guest go on, which waits until the restored one has
// given its disks back.
func (q *qemuAnchor) restored(ctx context.Context) error {
	monitor, err := dialQMP(ctx, q.socket)
	if err != nil {
		return err
	}
	return errors.Join(monitor.do("cont", nil, nil), monitor.Close())
}

func (q *qemuAnchor) resident(c *child) (uint64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", c.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	m, err := readSmaps(f, anchorMemoryMiB<<20)
	return m.guest, err
}
