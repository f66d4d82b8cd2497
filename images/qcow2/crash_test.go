package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/labtest"
)

// memFile is a Storage in memory. It keeps a journal of what was written
// between flushes.
type memFile struct {
	mu      sync.Mutex
	data    []byte
	journal []change
	fail    func(op string) error // before an operation; nil for never
}

// memLimit is how long a memFile may become.
const memLimit = 256 << 20

// change is one write, punch or flush.
type change struct {
	offset int64
	data   []byte // what is there afterwards
	flush  bool
}

func (m *memFile) failing(op string) error {
	if m.fail == nil {
		return nil
	}
	return m.fail(op)
}

func (m *memFile) ReadAtv(bufs [][]byte, offset int64) error {
	for _, b := range bufs {
		if err := m.ReadBuffered(b, offset); err != nil {
			return err
		}
		offset += int64(len(b))
	}
	return nil
}

func (m *memFile) ReadBuffered(p []byte, offset int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.failing("read"); err != nil {
		return err
	}
	clear(p)
	if offset < int64(len(m.data)) {
		copy(p, m.data[offset:])
	}
	return nil
}

func (m *memFile) WriteAtv(bufs [][]byte, offset int64) error {
	return m.WriteBuffered(bytes.Join(bufs, nil), offset)
}

func (m *memFile) WriteBuffered(p []byte, offset int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.failing("write"); err != nil {
		return err
	}
	if offset > memLimit {
		return unix.EFBIG
	}
	m.data = store(m.data, p, offset)
	m.journal = append(m.journal, change{offset: offset, data: bytes.Clone(p)})
	return nil
}

// store puts p into data, which grows.
func store(data, p []byte, offset int64) []byte {
	if end := int(offset) + len(p); end > len(data) {
		data = append(data, make([]byte, end-len(data))...)
	}
	copy(data[offset:], p)
	return data
}

func (m *memFile) Flush() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.failing("flush"); err != nil {
		return err
	}
	m.journal = append(m.journal, change{flush: true})
	return nil
}

func (m *memFile) Discard(offset, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.failing("discard"); err != nil {
		return err
	}
	n = min(n, int64(len(m.data))-offset)
	if n > 0 {
		clear(m.data[offset : offset+n])
		m.journal = append(m.journal, change{offset: offset, data: make([]byte, n)})
	}
	return nil
}

func (m *memFile) Length() (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return int64(len(m.data)), nil
}

func (m *memFile) Growable() bool { return true }
func (m *memFile) ReadOnly() bool { return false }
func (m *memFile) BlockSize() int { return 512 }

// powerCut returns what a power cut after the first n changes may leave: all
// that was flushed, and of what came after it any sectors.
func powerCut(rng *rand.Rand, start []byte, journal []change, n int) []byte {
	journal = journal[:n]
	stable := 0
	for i, c := range journal {
		if c.flush {
			stable = i
		}
	}
	out := bytes.Clone(start)
	chance := rng.Intn(101)
	for i, c := range journal {
		if i <= stable {
			out = store(out, c.data, c.offset)
			continue
		}
		if rng.Intn(100) >= chance {
			continue
		}
		torn := rng.Intn(2) == 0
		for at := int64(0); at < int64(len(c.data)); {
			k := min(512-(c.offset+at)%512, int64(len(c.data))-at)
			if !torn || rng.Intn(2) == 0 {
				out = store(out, c.data[at:at+k], c.offset+at)
			}
			at += k
		}
	}
	return out
}

// crashRun is a workload on an image in memory.
type crashRun struct {
	m     *memFile
	f     *File
	rng   *rand.Rand
	start []byte // of the file
	marks []mark
	// model is the value that each sector was stamped with last.
	model []int
	next  int
}

// mark is a moment at which everything was flushed.
type mark struct {
	at    int // in the journal
	model []int
}

// mark notes that everything is flushed.
func (r *crashRun) mark() {
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	r.marks = append(r.marks, mark{len(r.m.journal), append([]int(nil), r.model...)})
}

const crashSector = 512

func sector(v int) []byte {
	if v == 0 {
		return make([]byte, crashSector)
	}
	return bytes.Repeat([]byte(fmt.Sprintf("%15d\n", v)), crashSector/16)
}

// step writes, erases or flushes.
func (r *crashRun) step() error {
	n := len(r.model)
	at := r.rng.Intn(n)
	k := min(n-at, 1+r.rng.Intn(1<<r.rng.Intn(8)))
	switch r.rng.Intn(10) {
	case 0, 1:
		err := r.f.Flush()
		r.mark()
		return err
	case 4:
		if r.rng.Intn(5) > 0 {
			return nil
		}
		r.model = append(r.model, make([]int, 64<<10/crashSector)...)
		err := r.f.Resize(int64(len(r.model)) * crashSector)
		r.mark()
		return err
	case 2:
		clear(r.model[at : at+k])
		return r.f.WriteZeroes(int64(at)*crashSector, int64(k)*crashSector, r.rng.Intn(2) == 0)
	case 3:
		if err := r.f.Discard(int64(at)*crashSector, int64(k)*crashSector); err != nil {
			return err
		}
		for i := at; i < at+k; i++ {
			b := make([]byte, crashSector)
			if err := r.f.ReadAtv([][]byte{b}, int64(i)*crashSector); err != nil {
				return err
			}
			if isZero(b) {
				r.model[i] = 0
			}
		}
		return nil
	default:
		return r.write(at, k)
	}
}

// write stamps n sectors.
func (r *crashRun) write(at, n int) error {
	var data []byte
	for i := at; i < at+n; i++ {
		r.next++
		r.model[i] = r.next
		data = append(data, sector(r.next)...)
	}
	return r.f.WriteAtv([][]byte{data}, int64(at)*crashSector)
}

// TestPowerCut cuts the power at random moments of random workloads. What is
// left is never corrupt, holds what was flushed, and opens without leaks.
func TestPowerCut(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("qemu-img is not installed; try: apt install qemu-utils")
	}
	for _, o := range []string{"cluster_size=512", "cluster_size=512,refcount_bits=64", "cluster_size=4k", "cluster_size=64k", "cluster_size=1k,compat=0.10"} {
		t.Run(o, func(t *testing.T) {
			t.Parallel()
			leaks := 0
			for seed := range labtest.Count(3, 60) {
				leaks += powerCuts(t, o, int64(seed))
			}
			t.Logf("%d cuts left leaks", leaks)
		})
	}
}

func powerCuts(t *testing.T, options string, seed int64) (leaks int) {
	path := filepath.Join(t.TempDir(), "disk")
	size := int64(1 << 20)
	switch options {
	case "cluster_size=64k":
		size = 16 << 20
	case "cluster_size=512,refcount_bits=64":
		size = 6 << 20 // the refcount table must grow
	}
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, fmt.Sprint(size)).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	start, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	r := &crashRun{m: &memFile{data: bytes.Clone(start)}, rng: rand.New(rand.NewSource(seed)), start: start, model: make([]int, size/crashSector)}
	if r.f, err = Open(r.m, Options{}); err != nil {
		t.Fatal(err)
	}
	if seed%2 == 1 {
		r.f.pages.limit = 8 * r.f.pages.size
	}
	r.mark()
	if size == 6<<20 {
		if err := r.write(0, 1900<<10/crashSector); err != nil {
			t.Fatal(err)
		}
	}
	for range 150 {
		if err := r.step(); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.f.Close(); err != nil {
		t.Fatal(err)
	}
	for range labtest.Count(25, 100) {
		n := r.rng.Intn(len(r.m.journal) + 1)
		image := powerCut(r.rng, start, r.m.journal, n)
		if err := os.WriteFile(path, image, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput()
		var exit *exec.ExitError
		switch {
		case err == nil:
		case errors.As(err, &exit) && exit.ExitCode() == 3:
			leaks++
		default:
			t.Fatalf("seed %d, cut after %d of %d: %v\n%s", seed, n, len(r.m.journal), err, out)
		}
		r.afterCut(t, image, n)
	}
	return leaks
}

// afterCut opens what a cut left, twice.
func (r *crashRun) afterCut(t *testing.T, image []byte, n int) {
	t.Helper()
	m := &memFile{data: image}
	f, err := Open(m, Options{})
	if err != nil {
		t.Fatalf("cut after %d: %v", n, err)
	}
	flushed := r.marks[0]
	for _, k := range r.marks {
		if k.at <= n {
			flushed = k
		}
	}
	// Sectors that were not touched since the flush must be there.
	last := r.lastValues(n)
	got := make([]byte, f.Size())
	if err := f.ReadAtv([][]byte{got}, 0); err != nil {
		t.Fatalf("cut after %d: %v", n, err)
	}
	for i, v := range flushed.model {
		if last[i] == v && !bytes.Equal(got[i*crashSector:][:crashSector], sector(v)) {
			t.Fatalf("cut after %d: sector %d was flushed as %d and reads %q", n, i, v, got[i*crashSector:][:16])
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if f.h.Version < 3 {
		return // it has no dirty bit
	}
	// Nothing leaks any more.
	f, err = Open(m, Options{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := f.countReferences()
	if err != nil {
		t.Fatal(err)
	}
	for i := range min(f.covered(), f.high+100) {
		have := uint64(0)
		if err := f.transact(func() error {
			p, at, err := f.counts(i)
			if err == nil && p != nil {
				have = refcountAt(p.data, at, f.h.refcountOrder)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		want := uint64(0)
		if i < int64(len(c.counts)) {
			want = uint64(c.counts[i])
		}
		if have != want {
			t.Fatalf("cut after %d: cluster %d has refcount %d and %d references after recovery", n, i, have, want)
		}
	}
}

// lastValues returns, for each sector, the value at the first flush after n if
// it is the one before as well, and -1 if it may be either.
func (r *crashRun) lastValues(n int) []int {
	var before, after []int
	for _, k := range r.marks {
		if k.at <= n {
			before = k.model
		} else if after == nil {
			after = k.model
		}
	}
	if after == nil {
		after = r.model
	}
	out := make([]int, len(before))
	for i := range out {
		out[i] = before[i]
		if after[i] != before[i] {
			out[i] = -1
		}
	}
	return out
}
