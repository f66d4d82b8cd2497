package virtio

import (
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ditto.vm/memory"
)

// Where the rings of the tests lie.
const (
	testDesc  memory.GPA = 0x1000
	testAvail memory.GPA = 0x5000
	testUsed  memory.GPA = 0x6000
	testData  memory.GPA = 0x10000
)

// rig is a queue in 1 MiB of memory, with the driver's side done by hand.
type rig struct {
	t      testing.TB
	mem    *memory.Space
	q      *Queue
	size   int
	idx    uint16
	irqs   int
	failed []error
	writes []memory.Range
	race   func(gpa memory.GPA) // the driver's move just after a write, if not nil
}

// HostWrite implements memory.WriteObserver.
func (r *rig) HostWrite(gpa memory.GPA, n uint64) {
	r.writes = append(r.writes, memory.Range{Start: gpa, Size: n})
	if r.race != nil {
		r.race(gpa)
	}
}

func newSpace(t testing.TB) *memory.Space {
	t.Helper()
	mem, err := memory.New(memory.Config{Size: 1 << 20, HugePages: memory.HugePagesOff})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = mem.Close() })
	return mem
}

func newRig(t testing.TB, size int, features uint64) *rig {
	t.Helper()
	r := &rig{t: t, mem: newSpace(t), size: size}
	r.attach(features, QueueConfig{})
	return r
}

func (r *rig) attach(features uint64, at QueueConfig) {
	r.t.Helper()
	at.Size, at.Desc, at.Avail, at.Used = uint16(r.size), testDesc, testAvail, testUsed
	var err error
	r.q, err = NewQueue(r.mem, 0, at, QueueHooks{
		Features: features, KickFD: -1,
		Interrupt: func() { r.irqs++ },
		Failed:    func(err error) { r.failed = append(r.failed, err) },
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) bytes(gpa memory.GPA, n int) []byte {
	b, err := r.mem.Writable(gpa, uint64(n))
	if err != nil {
		r.t.Fatal(err)
	}
	return b
}

func (r *rig) put16(gpa memory.GPA, v uint16) { binary.LittleEndian.PutUint16(r.bytes(gpa, 2), v) }
func (r *rig) get16(gpa memory.GPA) uint16    { return binary.LittleEndian.Uint16(r.bytes(gpa, 2)) }
func (r *rig) usedEvent(v uint16)             { r.put16(testAvail+4+memory.GPA(2*r.size), v) }
func (r *rig) availEvent() uint16             { return r.get16(testUsed + 4 + memory.GPA(8*r.size)) }
func (r *rig) usedIndex() uint16              { return r.get16(testUsed + 2) }
func (r *rig) table(i int) memory.GPA         { return testDesc + memory.GPA(16*i) }
func (r *rig) usedEntry(i int) (id, n uint32) {
	b := r.bytes(testUsed+4+memory.GPA(8*(i%r.size)), 8)
	return binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
}

func (r *rig) desc(at, addr memory.GPA, n uint32, flags, next uint16) {
	b := r.bytes(at, 16)
	binary.LittleEndian.PutUint64(b, uint64(addr))
	binary.LittleEndian.PutUint32(b[8:], n)
	binary.LittleEndian.PutUint16(b[12:], flags)
	binary.LittleEndian.PutUint16(b[14:], next)
}

// offer makes chains available.
func (r *rig) offer(heads ...uint16) {
	for _, h := range heads {
		r.put16(testAvail+4+memory.GPA(2*(int(r.idx)%r.size)), h)
		r.idx++
	}
	r.put16(testAvail+2, r.idx)
}

// simple makes descriptor i a chain of one buffer to write.
func (r *rig) simple(i int) {
	r.desc(r.table(i), testData+memory.GPA(64*i), 64, descWrite, 0)
}

func (r *rig) pop(c *Chain) {
	r.t.Helper()
	if !r.q.Pop(c) {
		r.t.Fatalf("nothing to pop (failures: %v)", r.failed)
	}
}

func TestPopDirect(t *testing.T) {
	r := newRig(t, 8, 0)
	r.desc(r.table(3), testData, 10, descNext, 5)
	r.desc(r.table(5), testData+0x100, 20, descNext|descWrite, 1)
	r.desc(r.table(1), testData+0x200, 30, descWrite, 0)
	copy(r.bytes(testData, 10), "0123456789")
	r.offer(3)
	var c Chain
	r.pop(&c)
	if c.Head != 3 || c.ReadableBytes != 10 || c.WritableBytes != 50 || len(c.Readable) != 1 || len(c.Writable) != 2 {
		t.Fatalf("chain %+v", c)
	}
	buf := make([]byte, 4)
	if n := c.ReadAt(buf, 8); n != 2 || string(buf[:n]) != "89" {
		t.Errorf("read %q", buf[:n])
	}
	if n := c.ReadAt(buf, 10); n != 0 {
		t.Errorf("read %d bytes behind the end", n)
	}
	if r.q.Pop(&c) {
		t.Error("popped a second chain")
	}
}

func TestChainWriteAt(t *testing.T) {
	r := newRig(t, 8, 0)
	r.mem.SetObserver(r)
	r.desc(r.table(0), testData, 4, descNext|descWrite, 1)
	r.desc(r.table(1), testData+0x100, 4, descWrite, 0)
	r.offer(0)
	var c Chain
	r.pop(&c)
	r.writes = nil
	if n := c.WriteAt([]byte("abcdefghij"), 2); n != 6 {
		t.Errorf("wrote %d bytes, want 6", n)
	}
	if got := string(r.bytes(testData+2, 2)) + string(r.bytes(testData+0x100, 4)); got != "abcdef" {
		t.Errorf("wrote %q", got)
	}
	c.Wrote(5)
	want := []memory.Range{
		{Start: testData + 2, Size: 2}, {Start: testData + 0x100, Size: 4},
		{Start: testData, Size: 4}, {Start: testData + 0x100, Size: 1},
	}
	if diff := cmp.Diff(want, r.writes); diff != "" {
		t.Errorf("reported:\n%s", diff)
	}
}

func TestPopIndirect(t *testing.T) {
	r := newRig(t, 8, FeatureIndirectDesc)
	table := testData + 0x1000
	// A plain buffer first, then the table (virtio 1.2 2.7.5.3.2).
	r.desc(r.table(0), testData, 10, descNext, 1)
	r.desc(r.table(1), table, 48, descIndirect|descWrite, 0)
	r.desc(table, testData+0x100, 1, descNext, 2)
	r.desc(table+32, testData+0x200, 2, descNext|descWrite, 1)
	r.desc(table+16, testData+0x300, 3, descWrite, 0)
	r.offer(0)
	var c Chain
	r.pop(&c)
	if len(c.Readable) != 2 || len(c.Writable) != 2 || c.ReadableBytes != 11 || c.WritableBytes != 5 || c.Writable[1].GPA != testData+0x300 {
		t.Fatalf("chain %+v", c)
	}
}

func TestPopRefuses(t *testing.T) {
	for _, c := range []struct {
		name     string
		features uint64
		build    func(r *rig)
	}{
		{"indirect without the feature", 0, func(r *rig) {
			r.desc(r.table(0), testData, 16, descIndirect, 0)
			r.desc(testData, testData, 1, 0, 0)
		}},
		{"more than the cap", 0, func(r *rig) {
			for i := range 8 {
				r.desc(r.table(i), 0, 1<<20, descNext, uint16(i+1)%8)
			}
		}},
		{"more descriptors than the cap", FeatureIndirectDesc, func(r *rig) {
			r.desc(r.table(0), testData, 1, descNext, 1)
			r.desc(r.table(1), testData, MaxChainLength*16, descIndirect, 0)
			for i := range MaxChainLength {
				flags := uint16(descNext)
				if i == MaxChainLength-1 {
					flags = 0
				}
				r.desc(testData+memory.GPA(16*i), testData, 1, flags, uint16(i+1))
			}
		}},
		{"indirect inside indirect", FeatureIndirectDesc, func(r *rig) {
			r.desc(r.table(0), testData, 16, descIndirect, 0)
			r.desc(testData, testData+0x100, 16, descIndirect, 0)
			r.desc(testData+0x100, testData, 1, 0, 0)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, 8, c.features)
			c.build(r)
			r.offer(0)
			var chain Chain
			if r.q.Pop(&chain) {
				t.Fatal("accepted")
			}
			if len(r.failed) != 1 || !errors.Is(r.failed[0], ErrQueue) || !r.q.Broken() {
				t.Errorf("failures %v", r.failed)
			}
			r.offer(0)
			if r.q.Pop(&chain) || len(r.failed) != 1 {
				t.Error("a broken queue goes on")
			}
		})
	}
}

// TestSameHeadAgain offers one head more often than the ring has entries,
// without waiting for it to be given back.
func TestSameHeadAgain(t *testing.T) {
	r := newRig(t, 4, 0)
	r.simple(0)
	chains := make([]Chain, 5)
	for i := range 4 {
		r.offer(0)
		r.pop(&chains[i])
	}
	r.offer(0)
	if r.q.Pop(&chains[4]) || len(r.failed) != 1 {
		t.Errorf("five chains in flight in a ring of four, failures %v", r.failed)
	}
}

// TestWrap runs the ring around the 16-bit indexes.
func TestWrap(t *testing.T) {
	for _, features := range []uint64{0, FeatureEventIdx} {
		r := newRig(t, 4, features)
		r.idx = 0xFFF0
		r.put16(testAvail+2, r.idx)
		r.put16(testUsed+2, r.idx)
		r.attach(features, QueueConfig{NextAvail: r.idx, NextUsed: r.idx})
		for i := range 4 {
			r.simple(i)
		}
		var c Chain
		for i := range 64 {
			r.usedEvent(uint16(0xFFF0 + i))
			r.offer(uint16(i % 4))
			r.pop(&c)
			r.q.Push(c.Head, uint32(i))
			r.q.Publish()
			if id, n := r.usedEntry((0xFFF0 + i) & 0xFFFF); id != uint32(i%4) || n != uint32(i) {
				t.Fatalf("round %d: used %d, %d bytes", i, id, n)
			}
			if r.q.Pop(&c) {
				t.Fatal("popped twice")
			}
		}
		if r.irqs != 64 || r.usedIndex() != 0x0030 {
			t.Errorf("features %#x: %d interrupts, used index %#x", features, r.irqs, r.usedIndex())
		}
	}
}

// TestBatch publishes many with one interrupt, and nothing before.
func TestBatch(t *testing.T) {
	r := newRig(t, 8, 0)
	r.mem.SetObserver(r)
	for i := range 8 {
		r.simple(i)
	}
	var c Chain
	r.offer(0, 1, 2, 3, 4, 5)
	for range 6 {
		r.pop(&c)
		r.q.Push(c.Head, 64)
	}
	if r.usedIndex() != 0 || r.irqs != 0 {
		t.Error("visible before Publish")
	}
	r.writes = nil
	r.q.Publish()
	r.q.Publish()
	if r.usedIndex() != 6 || r.irqs != 1 {
		t.Errorf("used index %d, %d interrupts", r.usedIndex(), r.irqs)
	}
	want := []memory.Range{{Start: testUsed + 4, Size: 48}, {Start: testUsed + 2, Size: 2}}
	if diff := cmp.Diff(want, r.writes); diff != "" {
		t.Errorf("reported:\n%s", diff)
	}
	// The next batch goes around the end of the ring.
	r.offer(0, 1, 2, 3)
	for range 4 {
		r.pop(&c)
		r.q.Push(c.Head, 64)
	}
	r.writes = nil
	r.q.Publish()
	want = []memory.Range{{Start: testUsed + 4 + 48, Size: 16}, {Start: testUsed + 4, Size: 16}, {Start: testUsed + 2, Size: 2}}
	if diff := cmp.Diff(want, r.writes); diff != "" {
		t.Errorf("reported around the end:\n%s", diff)
	}
}

func TestInterruptSuppression(t *testing.T) {
	one := func(r *rig) {
		var c Chain
		r.simple(0)
		r.offer(0)
		r.pop(&c)
		r.q.Push(c.Head, 0)
		r.q.Publish()
	}
	t.Run("flag", func(t *testing.T) {
		r := newRig(t, 8, 0)
		r.put16(testAvail, availNoInterrupt)
		one(r)
		if r.irqs != 0 {
			t.Error("interrupt in spite of NO_INTERRUPT")
		}
		r.put16(testAvail, 0)
		one(r)
		if r.irqs != 1 {
			t.Error("no interrupt")
		}
	})
	t.Run("event index", func(t *testing.T) {
		r := newRig(t, 8, FeatureEventIdx)
		r.put16(testAvail, availNoInterrupt) // has no meaning here
		r.usedEvent(2)
		one(r)
		one(r)
		if r.irqs != 0 {
			t.Error("interrupt before used_event")
		}
		one(r)
		if r.irqs != 1 {
			t.Error("no interrupt at used_event")
		}
		one(r)
		if r.irqs != 1 {
			t.Error("interrupt after used_event")
		}
	})
}

func TestNotificationSuppression(t *testing.T) {
	t.Run("flag", func(t *testing.T) {
		r := newRig(t, 8, 0)
		r.simple(0)
		r.simple(1)
		var c Chain
		if r.q.Waiting() {
			t.Error("chains wait in an empty ring")
		}
		r.offer(0, 1)
		if !r.q.Waiting() {
			t.Error("no chains wait")
		}
		r.pop(&c)
		if r.get16(testUsed) != usedNoNotify {
			t.Error("kicks are wanted while the ring is drained")
		}
		r.pop(&c)
		if r.q.Pop(&c) || r.get16(testUsed) != 0 {
			t.Error("kicks are not wanted by an empty ring")
		}
	})
	t.Run("event index", func(t *testing.T) {
		r := newRig(t, 8, FeatureEventIdx)
		r.simple(0)
		var c Chain
		if !r.q.Empty() || r.availEvent() != 0 {
			t.Error("the first kick is not wanted")
		}
		r.offer(0)
		r.pop(&c)
		if r.availEvent() != 0 {
			t.Error("avail_event moved while draining")
		}
		if r.q.Waiting() || r.availEvent() != 0 {
			t.Error("looking for chains asked for a kick")
		}
		if r.q.Pop(&c) || r.availEvent() != 1 {
			t.Errorf("avail_event is %d, want 1", r.availEvent())
		}
	})
}

// TestLateChain adds a chain just as the device asks for a kick: the driver has
// not seen that yet and does not kick, so the device must look again.
func TestLateChain(t *testing.T) {
	for name, features := range map[string]uint64{"flag": 0, "event index": FeatureEventIdx} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 8, features)
			r.simple(0)
			r.simple(1)
			r.offer(0)
			var c Chain
			r.pop(&c)
			r.mem.SetObserver(r)
			r.race = func(memory.GPA) { r.race = nil; r.offer(1) }
			if !r.q.Pop(&c) || c.Head != 1 {
				t.Error("the late chain is lost")
			}
		})
	}
}

// TestLateInterrupt asks for an interrupt just as the device has published:
// the driver may not have seen the chain, so the device must look after it.
func TestLateInterrupt(t *testing.T) {
	for name, features := range map[string]uint64{"flag": 0, "event index": FeatureEventIdx} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 8, features)
			r.simple(0)
			r.offer(0)
			var c Chain
			r.pop(&c)
			r.put16(testAvail, availNoInterrupt)
			r.usedEvent(5)
			r.mem.SetObserver(r)
			r.race = func(gpa memory.GPA) {
				if gpa == testUsed+2 { // the index is out
					r.put16(testAvail, 0)
					r.usedEvent(0)
				}
			}
			r.q.Push(c.Head, 64)
			r.q.Publish()
			if r.irqs != 1 {
				t.Errorf("%d interrupts, want 1", r.irqs)
			}
		})
	}
}

func TestRewind(t *testing.T) {
	r := newRig(t, 8, FeatureEventIdx)
	for i := range 3 {
		r.simple(i)
	}
	r.offer(0, 1, 2)
	chains := make([]Chain, 3)
	for i := range chains {
		r.pop(&chains[i])
	}
	r.q.Push(chains[0].Head, 0)
	r.q.Rewind(2)
	if r.q.InFlight() != 0 {
		t.Errorf("%d in flight", r.q.InFlight())
	}
	for i := 1; i < 3; i++ {
		var c Chain
		r.pop(&c)
		if c.Head != uint16(i) {
			t.Errorf("head %d after rewinding, want %d", c.Head, i)
		}
	}
}

func TestNewQueueRefuses(t *testing.T) {
	good := QueueConfig{Size: 8, Desc: testDesc, Avail: testAvail, Used: testUsed}
	mem := newSpace(t)
	for name, change := range map[string]func(*QueueConfig){
		"no size":          func(c *QueueConfig) { c.Size = 0 },
		"odd size":         func(c *QueueConfig) { c.Size = 6 },
		"large size":       func(c *QueueConfig) { c.Size = 2 * MaxQueueSize },
		"desc alignment":   func(c *QueueConfig) { c.Desc += 8 },
		"avail alignment":  func(c *QueueConfig) { c.Avail++ },
		"used alignment":   func(c *QueueConfig) { c.Used += 2 },
		"desc outside":     func(c *QueueConfig) { c.Desc = 1<<20 - 16 },
		"avail outside":    func(c *QueueConfig) { c.Avail = 1<<20 - 2 },
		"used outside":     func(c *QueueConfig) { c.Used = 1 << 40 },
		"used wraps":       func(c *QueueConfig) { c.Used = ^memory.GPA(3) },
		"too many flights": func(c *QueueConfig) { c.NextAvail = 9 },
	} {
		c := good
		change(&c)
		if _, err := NewQueue(mem, 0, c, QueueHooks{}); !errors.Is(err, ErrQueue) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := NewQueue(mem, 0, good, QueueHooks{}); err != nil {
		t.Error(err)
	}
}

// FuzzChain lays the input over the descriptor table, an indirect table and
// the available ring. Whatever is in them, the queue must not panic, and what
// it accepts must lie in memory and within the caps.
func FuzzChain(f *testing.F) {
	seed := func(build func(r *rig)) {
		r := newRig(f, 8, FeatureIndirectDesc)
		build(r)
		r.offer(0, 3)
		f.Add(append(append([]byte(nil), r.bytes(testDesc, 256)...), r.bytes(testAvail, 32)...), uint8(3))
	}
	seed(func(r *rig) { r.simple(0); r.simple(3) })
	seed(func(r *rig) {
		r.desc(r.table(0), testDesc+128, 64, descIndirect, 0)
		r.desc(testDesc+128, testData, 8, descNext, 1)
		r.desc(testDesc+144, testData, 8, descWrite, 0)
		r.desc(r.table(3), testData, 8, descNext, 3)
	})
	f.Fuzz(func(t *testing.T, input []byte, features uint8) {
		if len(input) < 256 {
			return
		}
		mem := newSpace(t)
		if err := errors.Join(mem.WriteAt(input[:256], testDesc), mem.WriteAt(input[256:min(len(input), 256+64)], testAvail)); err != nil {
			t.Fatal(err)
		}
		q, err := NewQueue(mem, 0, QueueConfig{Size: 8, Desc: testDesc, Avail: testAvail, Used: testUsed}, QueueHooks{
			Features:  uint64(features) << 28,
			Interrupt: func() {}, Failed: func(error) {},
		})
		if err != nil {
			t.Fatal(err)
		}
		var c Chain
		for range 20 {
			if !q.Pop(&c) {
				break
			}
			checkChain(t, mem, &c)
			c.ReadAt(make([]byte, 100), 3)
			c.WriteAt(make([]byte, 100), 3)
			q.Push(c.Head, 1)
			q.Publish()
		}
	})
}

func checkChain(t *testing.T, mem *memory.Space, c *Chain) {
	t.Helper()
	var sums [2]uint64
	for i, buffers := range [][]Buffer{c.Readable, c.Writable} {
		for _, b := range buffers {
			if len(b.Data) == 0 || !mem.Contains(b.GPA, uint64(len(b.Data))) {
				t.Fatalf("buffer [%s, +%d)", b.GPA, len(b.Data))
			}
			sums[i] += uint64(len(b.Data))
		}
	}
	if sums != [2]uint64{c.ReadableBytes, c.WritableBytes} || sums[0]+sums[1] > MaxChainBytes || len(c.Readable)+len(c.Writable) > MaxChainLength {
		t.Fatalf("chain of %v bytes says %d and %d", sums, c.ReadableBytes, c.WritableBytes)
	}
}

// TestHotPathAllocates asserts that a warm queue allocates nothing.
func TestHotPathAllocates(t *testing.T) {
	r := newRig(t, 64, FeatureIndirectDesc|FeatureEventIdx)
	cycle := r.cycle()
	cycle()
	if n := testing.AllocsPerRun(100, cycle); n != 0 {
		t.Errorf("%v allocations a cycle", n)
	}
}

// cycle returns a driver and a device passing 32 chains of a block request's
// shape.
func (r *rig) cycle() func() {
	for i := range 32 {
		table := testData + memory.GPA(64*i)
		r.desc(r.table(i), table, 48, descIndirect, 0)
		r.desc(table, testData+0x8000, 16, descNext, 1)
		r.desc(table+16, testData+0x9000, 4096, descNext|descWrite, 2)
		r.desc(table+32, testData+0x8100, 1, descWrite, 0)
	}
	chains := make([]Chain, 32)
	return func() {
		for i := range 32 {
			r.put16(testAvail+4+memory.GPA(2*(int(r.idx)%r.size)), uint16(i))
			r.idx++
		}
		r.put16(testAvail+2, r.idx)
		for i := range chains {
			if !r.q.Pop(&chains[i]) {
				panic("nothing to pop")
			}
		}
		for i := range chains {
			r.q.Push(chains[i].Head, 4097)
		}
		r.q.Publish()
		if !r.q.Empty() {
			panic("more to pop")
		}
	}
}

func BenchmarkQueue(b *testing.B) {
	for name, features := range map[string]uint64{"event-idx": FeatureIndirectDesc | FeatureEventIdx, "flags": FeatureIndirectDesc} {
		b.Run(name, func(b *testing.B) {
			cycle := newRig(b, 64, features).cycle()
			b.ReportAllocs()
			for b.Loop() {
				cycle()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/32, "ns/chain")
		})
	}
}
