package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"ditto.vm/guest/payload"
	"ditto.vm/vmm/kvm"
)

const (
	// moveMemoryMiB is the memory of a guest that is moved for its speed.
	moveMemoryMiB = 4096
	// moveConnections carry memory, beside the one that controls.
	moveConnections = 4

	nameDittoTLS = "ditto-tls"
	nameQEMUTLS  = "qemu-tls"
)

// migrateNative: how fast bytes of pages travel.
func migrateNative() Benchmark {
	const throughput, cpu = "throughput", "cpu"
	return Benchmark{
		Name: "migrate-native",
		Title: fmt.Sprintf("Moving a payload of %d MiB, every page unlike any other, between two processes over loopback by %d connections; the guest is paused",
			moveMemoryMiB, moveConnections),
		Where: Native, Rounds: 5, Warmups: 1,
		Metrics: []Metric{
			{throughput, "MiB/s", Higher, "memory by the total time of the migration, as the VMM says"},
			{cpu, "s/GiB", Lower, "time of all cores that both sides' processes spent for a GiB of memory"},
		},
		Targets: []Target{
			{throughput, nameDitto, nameQEMU, 1},
			{throughput, nameDittoTLS, nameQEMUTLS, 1},
		},
		OpenLimit: time.Minute, RunLimit: 5 * time.Minute,
		Open: openMoves,
	}
}

// moves is a session that starts a payload, pauses it and moves it.
type moves struct {
	dir      string
	names    []string
	carriers []carrier
}

func openMoves(ctx context.Context, env *Env) (_ Session, err error) {
	s := &moves{}
	if s.dir, err = payloadFolder(env); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(s.dir))
		}
	}()
	certificates := filepath.Join(s.dir, "pki")
	if err := tlsFiles(ctx, env.Ditto, certificates); err != nil {
		return nil, err
	}
	for _, tls := range []string{"", certificates} {
		h := how{places: [2]place{loopback(), loopback()}, connections: moveConnections, tls: tls}
		pair, err := payloadCarriers(env, s.dir, h, moveMemoryMiB, 1)
		if err != nil {
			return nil, err
		}
		s.carriers = append(s.carriers, pair...)
	}
	s.names = []string{nameDitto, nameQEMU, nameDittoTLS, nameQEMUTLS}
	return s, nil
}

// payloadFolder makes a folder for what payloads on both VMMs need.
func payloadFolder(env *Env) (string, error) {
	if err := env.need("Ditto", env.Ditto, "QEMU", env.QEMU); err != nil {
		return "", err
	}
	return os.MkdirTemp(env.Scratch, "moves-")
}

// payloadCarriers are ditto and QEMU with a memory writer that has filled its
// memory and then writes so many pages a second, anywhere.
func payloadCarriers(env *Env, dir string, h how, memoryMiB int, rate uint64) ([]carrier, error) {
	work := fmt.Sprintf("memwriter:fill,order=random,rate=%d", rate)
	image, err := payloadImage(work, memoryMiB)
	if err != nil {
		return nil, err
	}
	kernel := filepath.Join(dir, fmt.Sprintf("writer-%d-%d.elf", memoryMiB, rate))
	if err := os.WriteFile(kernel, image, 0o600); err != nil {
		return nil, err
	}
	return []carrier{
		&dittoCarrier{how: h, ditto: env.Ditto, name: fmt.Sprintf("bench-%d", os.Getpid()), args: dittoArgs(env.Ditto, spec{
			kernel: "payload:" + work, memoryMiB: memoryMiB, cpus: 1,
		})},
		&qemuCarrier{how: h, socket: filepath.Join(dir, "qmp"), args: qemuPayloadArgs(env.QEMU, kernel, memoryMiB)},
	}, nil
}

// payloadImage makes a payload that any VMM with PVH starts.
func payloadImage(work string, memoryMiB int) ([]byte, error) {
	program, err := payload.Parse(work)
	if err != nil {
		return nil, err
	}
	if program.TSCHz, err = tscHz(); err != nil {
		return nil, err
	}
	return program.ELF(uint64(memoryMiB) << 20)
}

// tscHz is the frequency of a guest's time-stamp counter on this host.
func tscHz() (hz uint64, err error) {
	system, err := kvm.Open()
	if errors.Is(err, kvm.ErrNoDevice) || errors.Is(err, kvm.ErrPermission) {
		return 0, &Unavailable{Reason: err.Error()}
	}
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, system.Close()) }()
	vm, err := system.CreateVM()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, vm.Close()) }()
	vcpu, err := vm.CreateVCPU(0)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, vcpu.Close()) }()
	khz, err := vcpu.TSCKHz()
	return khz * 1000, err
}

// qemuPayloadArgs starts a payload under QEMU, with RAM where ditto has it (-M pc
// has 3 GiB below the hole, q35 has 2), and with a processor that QEMU can have on
// a KVM without nested paging, too.
func qemuPayloadArgs(qemu, kernel string, memoryMiB int) []string {
	return []string{
		qemu, "-M", "pc,usb=off,vmport=off,i8042=off,hpet=off,graphics=off", "-accel", "kvm", "-cpu", "qemu64,-svm",
		"-m", strconv.Itoa(memoryMiB), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console", "-kernel", kernel,
	}
}

// Contestants implements [Session].
func (s *moves) Contestants() []Contestant {
	var list []Contestant
	for i, c := range s.carriers {
		list = append(list, Contestant{s.names[i], shellLine(c.command())})
	}
	return list
}

// Run implements [Session].
func (s *moves) Run(ctx context.Context, i int) (Sample, error) {
	m, err := movePayload(ctx, s.carriers[i], true)
	if err != nil {
		return nil, err
	}
	const gib = float64(moveMemoryMiB) / 1024
	return Sample{"throughput": moveMemoryMiB / m.total.Seconds(), "cpu": m.cpu.Seconds() / gib}, nil
}

// Close implements [Session].
func (s *moves) Close() error { return os.RemoveAll(s.dir) }

// movePayload starts a payload, moves it when it has filled its memory, and ends
// it.
func movePayload(ctx context.Context, c carrier, paused bool) (m moved, err error) {
	if err := c.start(); err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	guest := c.console()
	if _, _, err := guest.waitFor(ctx, 0, strings.TrimSpace(payload.FilledLine)); err != nil {
		return m, err
	}
	if paused {
		if err := c.pause(ctx); err != nil {
			return m, err
		}
	}
	return c.move(ctx)
}
