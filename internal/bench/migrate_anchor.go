package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	// slowLink is the slower network of the anchor guest's migrations, in Mbit/s.
	slowLink = 100
	// loadSettle is for how long a load runs before the guest is moved.
	loadSettle = 3 * time.Second
)

// anchorMove is one migration of the anchor guest.
type anchorMove struct {
	name, what string
	link       int    // Mbit/s, 0 for no limit
	load       string // a command that goes on in the guest
}

// anchorMoves are an even number: the guest ends where it began. A load leaves
// memory behind that is like nothing else, so they come last.
func anchorMoves() []anchorMove {
	var files []string
	for i := range 6 {
		files = append(files, fmt.Sprintf("/tmp/d/%02d", i))
	}
	fio := "fio --name=rewrite --filename=" + strings.Join(files, ":") +
		" --rw=randwrite --bs=64k --rate=10m --time_based --runtime=1000 --ioengine=psync --allow_file_create=0"
	return []anchorMove{
		{name: "idle", what: "idle, the network not shaped"},
		{name: "slow", what: fmt.Sprintf("idle, over %d Mbit/s", slowLink), link: slowLink},
		{name: "fio", what: "fio rewrites 10 MiB/s of its files", load: fio},
		{name: "stress", what: "stress-ng --vm dirties 32 MiB over and over", load: "stress-ng --vm 1 --vm-bytes 32M --vm-keep --quiet"},
	}
}

// migrateAnchor: a Linux guest that has read files, between two hosts that see the
// same disks.
func migrateAnchor() Benchmark {
	b := Benchmark{
		Name: "migrate-anchor",
		Title: fmt.Sprintf("Moving a Debian guest of %d MiB that has read %d files of %d MiB between two network namespaces that see the same disks",
			anchorMemoryMiB, anchorFiles, anchorFileMiB),
		Where: Lab, LabCPUs: 1, NeedsDisk: true, Rounds: 3,
		OpenLimit: 10 * time.Minute, RunLimit: 15 * time.Minute,
		Targets: []Target{
			{"wire-idle", nameDitto, nameQEMU, 0.14},
			{"wire-idle", nameDittoZstd, nameQEMU, 0.04},
			{"total-idle", nameDitto, nameQEMU, 0.40},
			{"total-slow", nameDitto, nameQEMU, 0.10},
			{"downtime-idle", nameDitto, nameQEMU, 1},
		},
		Open: openAnchorMoves,
	}
	for _, m := range anchorMoves() {
		b.Metrics = append(b.Metrics,
			Metric{"wire-" + m.name, "MiB", Lower, "what the link carried, headers and both directions, " + m.what},
			Metric{"total-" + m.name, "s", Lower, "the migration, as the VMM says, " + m.what},
			Metric{"asked-" + m.name, "s", Lower, "from the request (exec of ditto migrate, a command to QEMU) to its end, " + m.what},
			Metric{"downtime-" + m.name, "ms", Lower, "as the VMM says, " + m.what})
	}
	return b
}

// anchorMoveSession starts a guest for each run, since loads leave their marks.
type anchorMoveSession struct {
	env   *Env
	dir   string
	files string // the image that guests get copies of
	net   *netPair
}

// movedWays are the contestants.
func movedWays() []string { return []string{nameDitto, nameDittoZstd, nameQEMU} }

func openAnchorMoves(ctx context.Context, env *Env) (_ Session, err error) {
	if err := needLoad(env); err != nil {
		return nil, err
	}
	s := &anchorMoveSession{env: env}
	if s.net, err = openNetPair(ctx); err != nil {
		return nil, err
	}
	if s.dir, err = os.MkdirTemp(env.Scratch, "moves-"); err != nil {
		return nil, errors.Join(err, s.net.close())
	}
	s.files = filepath.Join(s.dir, "files")
	if err := makeAnchorFiles(ctx, s.files); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// carrier is a contestant with the disk of its own that it writes.
func (s *anchorMoveSession) carrier(i int) carrier {
	g := loadGuest(s.env)
	g.memoryMiB = anchorMemoryMiB
	g.disks = append(g.disks, guestDisk{path: s.disk(), cache: "writeback"})
	name := movedWays()[i]
	h := how{places: s.net.places, connections: moveConnections, throttle: true, zstd: name == nameDittoZstd}
	if name == nameQEMU {
		return &qemuCarrier{how: h, args: qemuArgs(s.env.QEMU, qemuQ35(), g), socket: filepath.Join(s.dir, "qmp")}
	}
	return &dittoCarrier{how: h, ditto: s.env.Ditto, name: name, args: dittoArgs(s.env.Ditto, g)}
}

func (s *anchorMoveSession) disk() string { return filepath.Join(s.dir, "disk.raw") }

// Contestants implements [Session].
func (s *anchorMoveSession) Contestants() []Contestant {
	var list []Contestant
	for i, name := range movedWays() {
		list = append(list, Contestant{name, shellLine(s.carrier(i).command())})
	}
	return list
}

// Run implements [Session].
func (s *anchorMoveSession) Run(ctx context.Context, i int) (sample Sample, err error) {
	if _, err := output(ctx, "cp", "--sparse=never", s.files, s.disk()); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.Remove(s.disk())) }()
	c := s.carrier(i)
	if err := c.start(); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	g, err := joinShell(ctx, c.console())
	if err != nil {
		return nil, err
	}
	if err := errors.Join(readFiles(ctx, g, "/dev/vdb"), anchorRest(ctx)); err != nil {
		return nil, err
	}
	sample = Sample{}
	for _, m := range anchorMoves() {
		if err := s.move(ctx, c, g, m, sample); err != nil {
			return nil, fmt.Errorf("%s: %w", m.name, err)
		}
	}
	return sample, nil
}

// move measures one migration, under a load.
func (s *anchorMoveSession) move(ctx context.Context, c carrier, g *shellGuest, m anchorMove, sample Sample) error {
	if err := s.net.shape(ctx, m.link); err != nil {
		return err
	}
	if m.load != "" {
		if _, err := g.run(ctx, m.load+" > /dev/null 2>&1 & sleep "+fmt.Sprint(loadSettle.Seconds())); err != nil {
			return err
		}
	}
	before, err := s.net.carried(ctx)
	if err != nil {
		return err
	}
	did, err := c.move(ctx)
	if err != nil {
		return err
	}
	after, err := s.net.carried(ctx)
	if err != nil {
		return err
	}
	sample["wire-"+m.name] = float64(after-before) / (1 << 20)
	sample["total-"+m.name], sample["asked-"+m.name] = did.total.Seconds(), did.asked.Seconds()
	sample["downtime-"+m.name] = milliseconds(did.downtime)
	// The guest answers where it is now.
	g.child = c.console()
	check := "true"
	if m.load != "" {
		check = "kill $!; wait $! || true"
	}
	_, err = g.run(ctx, check)
	return err
}

// Close implements [Session].
func (s *anchorMoveSession) Close() error { return errors.Join(s.net.close(), os.RemoveAll(s.dir)) }
