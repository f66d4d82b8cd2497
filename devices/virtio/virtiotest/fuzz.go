package virtiotest

import (
	"encoding/binary"
	"testing"

	"ditto.vm/devices/virtio"
	"ditto.vm/memory"
)

// Fuzz makes a fuzz target of a device: a driver that does whatever the input
// says with registers, rings and memory, and then resets the device, which
// must work again. seeds are programs that Play understands; some are added.
func Fuzz(f *testing.F, newDevice func(tb testing.TB) virtio.Device, seeds ...[]byte) {
	f.Helper()
	for _, s := range append(seeds, someSeeds()...) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, program []byte) {
		d := NewDriver(t, newDevice(t))
		d.Start(allFeatures, 8)
		d.Play(program)
		d.Start(allFeatures, 8)
		d.Function.Pause()
		if _, err := d.Function.State(); err != nil {
			t.Fatal(err)
		}
	})
}

// The operations of a program, one byte each, with their operands behind.
const (
	opCommon  = iota // offset, length code, 8 of data: write the common configuration
	opConfig         // offset, length code, 8 of data: write and read the device configuration
	opPCI            // offset, length code, 8 of data: write and read PCI configuration space
	opDesc           // index, flags, next, address code, length: a descriptor of a queue
	opOffer          // head: put it on the available ring
	opKick           // kick the queue
	opQueue          // index: later operations are about this queue
	opMemory         // n, n bytes: the content of the buffers
	opCycle          // pause and resume
	opRestart        // reset and start again
	opCount
)

// maxSteps bounds a program, so that no input takes long.
const maxSteps = 200

// Play runs a program. What it lacks at its end reads as zeros.
func (d *Driver) Play(program []byte) {
	p := player{d: d, in: program, data: d.Alloc(8192, 4096)}
	for range maxSteps {
		if len(p.in) == 0 {
			return
		}
		p.step()
	}
}

type player struct {
	d     *Driver
	in    []byte
	data  memory.GPA // where buffers lie
	queue int
}

// take consumes n bytes.
func (p *player) take(n int) []byte {
	out := make([]byte, n)
	p.in = p.in[copy(out, p.in):]
	return out
}

func (p *player) step() {
	d := p.d
	switch op := p.take(1)[0] % opCount; op {
	case opCommon, opConfig, opPCI:
		p.register(op)
	case opDesc:
		b := p.take(6)
		addr := p.data + memory.GPA(b[3])*16
		if b[3] >= 0xF0 { // somewhere it should not be
			addr = memory.GPA(b[3]&0xF) << 36
		}
		q := d.Queue(p.queue)
		q.SetDescriptor(int(b[0])%q.size, addr, uint32(binary.LittleEndian.Uint16(b[4:])), uint16(b[1]), uint16(b[2])%uint16(q.size+1))
	case opOffer:
		d.Queue(p.queue).Offer(uint16(p.take(1)[0]) % uint16(d.Queue(p.queue).size+1))
	case opKick:
		d.Queue(p.queue).Expose()
		d.Queue(p.queue).ForceKick()
	case opQueue:
		p.queue = int(p.take(1)[0]) % d.Queues()
	case opMemory:
		content := p.take(int(p.take(1)[0]))
		if err := d.Machine.Memory.WriteAt(content, p.data); err != nil {
			d.TB.Fatal(err)
		}
	case opCycle:
		d.Function.Pause()
		if err := d.Function.Resume(); err != nil {
			d.TB.Fatal(err)
		}
	case opRestart:
		d.ConfigWrite(4, 2, 6)
		d.Start(allFeatures, 8)
		p.queue = 0
	}
}

// register reads and writes a register of any kind.
func (p *player) register(op byte) {
	d, b := p.d, p.take(3)
	offset := memory.GPA(binary.LittleEndian.Uint16(b))
	data := p.take(1 << (b[2] % 4))
	base := map[byte]memory.GPA{opCommon: d.Common, opConfig: d.Config, opPCI: ECAM + memory.GPA(d.Slot<<15)}[op]
	switch op {
	case opCommon:
		offset %= 64
	case opPCI:
		offset %= 256
		if offset < 0x34 { // the program's later steps need the BARs in place
			offset += 0x34
		}
	default:
		offset %= 128
	}
	d.Machine.Write(base+offset, data)
	d.Machine.Read(base+offset, data)
}

// someSeeds are programs that get far: valid chains, a loop, a reset.
func someSeeds() [][]byte {
	request := []byte{
		opMemory, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
		opDesc, 0, 1, 1, 0, 16, 0,
		opDesc, 1, 3, 2, 16, 0, 2,
		opDesc, 2, 2, 0, 64, 1, 0,
		opOffer, 0, opKick,
	}
	return [][]byte{
		request,
		append(append([]byte(nil), request...), opCycle, opRestart),
		{opQueue, 1, opDesc, 0, 1, 0, 0, 16, 0, opOffer, 0, opKick, opCycle},
		{opCommon, 20, 0, 0, 0, opCommon, 20, 0, 0, 15, opConfig, 0, 0, 3, 1, 2, 3, 4, 5, 6, 7, 8},
		{opPCI, 0x90, 0, 2, 0xFF, 0xFF, 0xFF, 0xFF, opDesc, 0, 0, 0, 0xF8, 16, 0, opOffer, 0, opKick},
	}
}
