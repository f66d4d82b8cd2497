package bench

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// nameQEMU is QEMU with the machine type its users have most: -M q35.
const nameQEMU = "qemu"

// The disk and network benchmarks' guest.
const (
	loadMemoryMiB = 1024
	loadCPUs      = 1
	testDiskBytes = 256 << 20
	fioSeconds    = 4
)

// fioJob is one pattern of I/O.
type fioJob struct {
	metric Metric
	args   string
	write  bool
	iops   bool
}

func fioJobs() []fioJob {
	return []fioJob{
		{Metric{"seq-read", "MiB/s", Higher, "sequential read, 128 KiB a request"}, "--rw=read --bs=128k", false, false},
		{Metric{"rand-read", "IOPS", Higher, "random read, 4 KiB a request"}, "--rw=randread --bs=4k", false, true},
		{Metric{"rand-write", "IOPS", Higher, "random write, 4 KiB a request"}, "--rw=randwrite --bs=4k", true, true},
	}
}

// disk: fio in the guest on a virtio disk with one cache mode.
func disk(cache string) Benchmark {
	b := Benchmark{
		Name: "disk-" + cache,
		Title: fmt.Sprintf("fio in a Debian guest (%d vCPU) on a virtio disk, cache=%s: libaio, direct, depth 32, %d s a run",
			loadCPUs, cache, fioSeconds),
		Where: Lab, LabCPUs: 1, NeedsDisk: true, Rounds: 5, Warmups: 1,
		OpenLimit: 5 * time.Minute, RunLimit: 2 * time.Minute,
		Open: func(ctx context.Context, env *Env) (Session, error) {
			return openDisk(ctx, env, cache, []way{
				{nameDitto, func(g spec) []string { return dittoArgs(env.Ditto, g) }},
				{nameQEMU, func(g spec) []string { return qemuArgs(env.QEMU, qemuQ35(), g) }},
			})
		},
	}
	for _, job := range fioJobs() {
		b.Metrics = append(b.Metrics, job.metric)
		b.Targets = append(b.Targets, Target{job.metric.Name, nameDitto, nameQEMU, 1})
	}
	return b
}

// namesDisk: the same with and without names of pages.
func namesDisk() Benchmark {
	const off = "ditto-names-off"
	b := disk("writeback")
	b.Name = "names-disk"
	b.Title = "What names of pages cost I/O: " + b.Title
	b.Targets = nil
	b.Open = func(ctx context.Context, env *Env) (Session, error) {
		return openDisk(ctx, env, "writeback", []way{
			{nameDitto, func(g spec) []string { return dittoArgs(env.Ditto, g) }},
			{off, func(g spec) []string { return append(dittoArgs(env.Ditto, g), "--names", "off") }},
		})
	}
	for _, job := range fioJobs() {
		b.Targets = append(b.Targets, Target{job.metric.Name, nameDitto, off, 0.97})
	}
	return b
}

// way is one of the ways to run a guest.
type way struct {
	name string
	args func(spec) []string
}

// diskSession measures I/O of two running guests.
type diskSession struct{ *pair }

func openDisk(ctx context.Context, env *Env, cache string, ways []way) (Session, error) {
	if err := needLoad(env); err != nil {
		return nil, err
	}
	var files []string
	clean := func() (all error) {
		for _, f := range files {
			all = errors.Join(all, os.Remove(f))
		}
		return all
	}
	var guests []launch
	for _, w := range ways {
		path := filepath.Join(env.Scratch, "fio-"+w.name+".raw")
		files = append(files, path)
		if err := fillFile(path, testDiskBytes); err != nil {
			return nil, errors.Join(err, clean())
		}
		g := loadGuest(env)
		g.disks = append(g.disks, guestDisk{path: path, cache: cache})
		guests = append(guests, launch{w.name, w.args(g)})
	}
	p, err := openPair(ctx, guests, clean)
	if err != nil {
		return nil, err
	}
	return diskSession{p}, nil
}

// needLoad skips a benchmark that lacks what the Debian guest is made of.
func needLoad(env *Env) error {
	return env.need("Ditto", env.Ditto, "QEMU", env.QEMU, "Kernel", env.Kernel, "Initrd", env.Initrd,
		"RootDisk", env.RootDisk)
}

// loadGuest is the Debian guest, its root disk shared and read-only.
func loadGuest(env *Env) spec {
	return spec{
		kernel: env.Kernel, initrd: env.Initrd, cmdline: shellCmdline,
		memoryMiB: loadMemoryMiB, cpus: loadCPUs,
		disks: []guestDisk{{path: env.RootDisk, readOnly: true, cache: "writeback"}},
	}
}

// twoWays is a guest under ditto and one under QEMU.
func twoWays(env *Env, ditto, qemu spec) []launch {
	return []launch{
		{nameDitto, dittoArgs(env.Ditto, ditto)},
		{nameQEMU, qemuArgs(env.QEMU, qemuQ35(), qemu)},
	}
}

// fillFile makes a file without holes, so that no write has to allocate.
func fillFile(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	block := make([]byte, 4<<20)
	_, err = rand.Read(block)
	for done := int64(0); err == nil && done < size; done += int64(len(block)) {
		_, err = f.Write(block[:min(int64(len(block)), size-done)])
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// Run implements [Session].
func (s diskSession) Run(ctx context.Context, i int) (Sample, error) {
	sample := Sample{}
	for _, job := range fioJobs() {
		out, err := s.guests[i].run(ctx, fmt.Sprintf(
			"fio --name=j --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=32 --time_based --runtime=%d --ramp_time=1 --norandommap --randrepeat=0 --output-format=terse --terse-version=3 %s",
			fioSeconds, job.args))
		if err != nil {
			return nil, err
		}
		if sample[job.metric.Name], err = fioValue(out, job); err != nil {
			return nil, err
		}
	}
	return sample, nil
}

// Fields of fio's terse output, version 3, counted from 0 (fio HOWTO, "Terse
// output").
const (
	terseVersion   = 0
	terseError     = 4
	terseReadKiB   = 6
	terseReadIOPS  = 7
	terseWriteKiB  = 47
	terseWriteIOPS = 48
)

// fioValue reads fio's terse line: MiB/s, or requests a second.
func fioValue(out string, job fioJob) (float64, error) {
	for line := range strings.Lines(out) {
		fields := strings.Split(strings.TrimSpace(line), ";")
		if len(fields) <= terseWriteIOPS || fields[terseVersion] != "3" {
			continue
		}
		if fields[terseError] != "0" {
			return 0, fmt.Errorf("fio: error %s", fields[terseError])
		}
		field := map[[2]bool]int{
			{false, false}: terseReadKiB, {false, true}: terseReadIOPS,
			{true, false}: terseWriteKiB, {true, true}: terseWriteIOPS,
		}[[2]bool{job.write, job.iops}]
		value, err := strconv.ParseFloat(fields[field], 64)
		if err != nil || value <= 0 {
			return 0, fmt.Errorf("fio: field %d is %q", field, fields[field])
		}
		if !job.iops {
			value /= 1024
		}
		return value, nil
	}
	return 0, fmt.Errorf("fio: %w: no terse line in %q", io.ErrUnexpectedEOF, out)
}
