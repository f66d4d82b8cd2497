package vmm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
)

// Where the tests' guests have what, beside the memory writer's own: the rings of
// the disk's driver at 2 MiB and the balloon's at 3 MiB, the writer's working set
// from 4 MiB on.
const (
	namesRAM     = 128 << 20
	namesBuffers = memory.GPA(64 << 20) // what is read from the disk
	namesDisk    = 16 << 20
)

// namesConfig is a machine with a disk of random bytes, a balloon and a guest
// that writes memory of its own at full speed.
func namesConfig(t *testing.T) (config.Config, []byte) {
	t.Helper()
	c := fullConfig(t, "memwriter:size=16M,words=8,seed=3")
	c.Memory.Size = namesRAM
	c.RNG = false // it would push the balloon's rings into the working set
	content := make([]byte, namesDisk)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(content)
	if err := os.WriteFile(c.Disks[0].Path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return c, content
}

// attach plays the driver of a running machine's device, in place of the
// payload, which drives none.
func attach(t *testing.T, m *VM, name string) *virtiotest.Driver {
	t.Helper()
	machine := &virtiotest.Machine{Memory: m.mem, Ports: &m.ports, MMIO: &m.mmio, Log: m.log}
	for i, d := range m.pci.devices {
		if d.info.Name != name {
			continue
		}
		driver := machine.Attach(t, d.PCIDevice, 1+i)
		driver.Reset()
		driver.Negotiate(^uint64(0))
		driver.SetupQueues(16)
		driver.SetStatus(virtio.StatusDriverOK)
		return driver
	}
	t.Fatalf("no device is called %s", name)
	return nil
}

// transfer makes one request of a disk and waits for it: a header, and buffer.
func transfer(t *testing.T, d *virtiotest.Driver, kind uint32, offset int64, buffer memory.Range) {
	t.Helper()
	head := d.Alloc(16, 16)
	header := binary.LittleEndian.AppendUint32(nil, kind)
	header = binary.LittleEndian.AppendUint64(append(header, 0, 0, 0, 0), uint64(offset/512))
	if err := d.Machine.Memory.WriteAt(header, head); err != nil {
		t.Fatal(err)
	}
	status := d.Alloc(1, 1)
	q := d.Queue(0)
	chain := q.Add(false, virtiotest.Segment{GPA: head, Len: 16},
		virtiotest.Segment{GPA: buffer.Start, Len: int(buffer.Size), Write: kind == 0},
		virtiotest.Segment{GPA: status, Len: 1, Write: true})
	q.Kick()
	q.Wait(chain)
	if got, err := d.Machine.Memory.View(status, 1); err != nil || got[0] != 0 {
		t.Fatalf("request %d of %d bytes at %d: status %v, %v", kind, buffer.Size, offset, got, err)
	}
}

// readDisk reads all of the disk into the buffers, in pieces of 256 KiB.
func readDisk(t *testing.T, d *virtiotest.Driver) {
	t.Helper()
	const piece = 256 << 10
	for at := 0; at < namesDisk; at += piece {
		transfer(t, d, 0, int64(at), memory.Range{Start: namesBuffers + memory.GPA(at), Size: piece})
	}
}

// settledNames pauses the machine and returns how many names of the buffers are
// proven, after comparing each with the disk.
func settledNames(t *testing.T, m *VM, content []byte) (proven int) {
	t.Helper()
	ctx := deadline(t)
	if err := errors.Join(m.Pause(ctx), m.naming.Settle(ctx)); err != nil {
		t.Fatal(err)
	}
	for gfn := memory.GFN(0); gfn < namesRAM/memory.PageSize; gfn++ {
		name := m.naming.Table().At(gfn)
		if !name.Proven() {
			continue
		}
		page, err := m.mem.View(gfn.GPA(), memory.PageSize)
		if err != nil {
			t.Fatal(err)
		}
		block := content[name.Number()*memory.PageSize:][:memory.PageSize]
		if name.Kind() != names.Block || !bytes.Equal(page, block) {
			t.Errorf("page %s is not %s", gfn, name)
		}
		proven++
	}
	if err := m.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	return proven
}

// TestNamesOfARunningMachine: what is read from a disk is named and proven while
// the guest writes elsewhere, and names die with what they name.
func TestNamesOfARunningMachine(t *testing.T) {
	c, content := namesConfig(t)
	m := newVM(t, c, newConsole())
	if !m.naming.Proves() {
		t.Skipf("tracker %s does not prove names: Linux 6.7 or newer is needed", m.tracker.Kind())
	}
	ctx := deadline(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	const pages = namesDisk / memory.PageSize
	disk := attach(t, m, "blk0")
	readDisk(t, disk)
	if named := m.naming.Stats().Named; named != pages {
		t.Errorf("%d pages are named after the disk of %d was read", named, pages)
	}
	await(t, ctx, "names are proven", func() bool { return m.naming.Stats().NamedProven == pages })
	if got := settledNames(t, m, content); got != pages {
		t.Errorf("%d names are proven on the paused machine, want %d", got, pages)
	}

	// Each of these takes pages or blocks away from the proven ones.
	const page = memory.PageSize
	if err := m.mem.WriteAt([]byte("the VMM"), namesBuffers); err != nil {
		t.Fatal(err)
	}
	transfer(t, disk, 1, 4*page, memory.Range{Start: namesBuffers + 8*page, Size: page}) // block 4 gets what page 8 holds
	copy(content[4*page:], content[8*page:9*page])
	transfer(t, disk, 0, 20*page, memory.Range{Start: namesBuffers + 12*page, Size: page})
	balloon := attach(t, m, "balloon0")
	balloon.Queue(0).Do([][]byte{binary.LittleEndian.AppendUint32(nil, uint32((namesBuffers+16*page)/page))})
	stored, err := m.mem.Writable(namesBuffers+24*page, page) // as a vCPU does: nobody is told
	if err != nil {
		t.Fatal(err)
	}
	stored[0]++
	for _, gone := range []int{0, 16, 24} {
		settledNames(t, m, content)
		if name := m.naming.Table().At((namesBuffers + memory.GPA(gone)*page).GFN()); name != 0 {
			t.Errorf("page %d keeps the name %s", gone, name)
		}
	}
	if name := m.naming.Table().At((namesBuffers + 4*page).GFN()); name != 0 {
		t.Errorf("page 4 keeps the name %s of a block that was written", name)
	}
	for changed, block := range map[int]uint64{8: 4, 12: 20} {
		if name := m.naming.Table().At((namesBuffers + memory.GPA(changed)*page).GFN()); name.Number() != block {
			t.Errorf("page %d is %s, want block %d", changed, name, block)
		}
	}
}

// TestNamesDieAtARestart: a restart empties memory, and with it the names.
func TestNamesDieAtARestart(t *testing.T) {
	c, content := namesConfig(t)
	m := newVM(t, c, newConsole())
	ctx := deadline(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		readDisk(t, attach(t, m, "blk0"))
		m.request(requestReset)
		await(t, ctx, "restart", func() bool { m.mu.Lock(); defer m.mu.Unlock(); return m.resets > i })
		if s := m.naming.Stats(); s.Named != 0 {
			t.Errorf("%d pages are named after the restart", s.Named)
		}
	}
	readDisk(t, attach(t, m, "blk0"))
	if s := m.naming.Stats(); s.Named != namesDisk/memory.PageSize {
		t.Errorf("%d pages are named after the disk was read again", s.Named)
	}
	settledNames(t, m, content)
}

// TestNamesOff: without names nothing is recorded, and all else is as before.
func TestNamesOff(t *testing.T) {
	c, content := namesConfig(t)
	c.Memory.Names = false
	m := newVM(t, c, newConsole())
	if m.naming != nil {
		t.Fatal("names are recorded")
	}
	ctx := deadline(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	readDisk(t, attach(t, m, "blk0"))
	got, err := m.mem.View(namesBuffers, namesDisk)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("the disk reads other bytes, %v", err)
	}
	if err := errors.Join(m.Pause(ctx), m.Resume(ctx)); err != nil {
		t.Fatal(err)
	}
}

// TestResizeDisk: image, device and names follow a disk's size.
func TestResizeDisk(t *testing.T) {
	c, content := namesConfig(t)
	m := newVM(t, c, newConsole())
	ctx := deadline(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	d := attach(t, m, "blk0")
	readDisk(t, d)
	const half, page = namesDisk / 2, memory.PageSize
	for _, size := range []uint64{half, namesDisk} {
		if err := m.ResizeDisk(0, size); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(c.Disks[0].Path)
		if err != nil || uint64(info.Size()) != size {
			t.Errorf("the image has %d bytes, %v; want %d", info.Size(), err, size)
		}
		if got := binary.LittleEndian.Uint64(d.DeviceConfig(0, 8)); got != size/512 {
			t.Errorf("the guest sees %d sectors, want %d", got, size/512)
		}
	}
	if s := m.naming.Stats(); s.Named != half/page {
		t.Errorf("%d pages are named after half of the disk was cut off, want %d", s.Named, half/page)
	}
	clear(content[half:])
	readDisk(t, d) // of zeros, where it was cut off
	settledNames(t, m, content)

	for _, test := range []struct {
		disk  int
		bytes uint64
		want  string
	}{
		{1, page, "no disk 1"}, {-1, page, "no disk -1"}, {0, 0, "multiple of 512"}, {0, page + 1, "multiple of 512"}, {0, 1 << 63, "multiple of 512"},
	} {
		if err := m.ResizeDisk(test.disk, test.bytes); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("disk %d of %d bytes: %v, want %q", test.disk, test.bytes, err, test.want)
		}
	}
	m.Kill()
	if _, err := m.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.ResizeDisk(0, page); !errors.Is(err, api.ErrWrongState) {
		t.Errorf("after the end: %v", err)
	}
}
