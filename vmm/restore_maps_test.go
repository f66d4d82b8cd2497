package vmm

import (
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"ditto.vm/internal/labtest"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/config"
)

// mostMaps is what a machine may have of mappings; a process has 65530 of them.
const mostMaps = 60000

// scattered is a machine with pages that equal blocks of a disk in no order:
// first single ones, then rows that are just long enough to be mapped.
type scattered struct {
	c      config.Config
	block  []uint64 // that each page equals
	single uint64   // pages
}

// scatteredFrom is where these pages begin.
const scatteredFrom = memory.GPA(16 << 20)

func newScattered(t *testing.T, single, rows int) *scattered {
	t.Helper()
	s := &scattered{single: uint64(single)}
	// Rows are never neighbours on the disk, even if they are in memory.
	rng := rand.New(rand.NewPCG(100, 1))
	for _, b := range rng.Perm(single) {
		s.block = append(s.block, uint64(b))
	}
	for _, row := range rng.Perm(rows) {
		for i := range mapMinPages {
			s.block = append(s.block, uint64(single+row*mapMinPages+i))
		}
	}
	path := filepath.Join(quickDir(t), "disk.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for b := range uint64(len(s.block)) {
		if _, err := f.Write(s.content(b)); err != nil {
			t.Fatal(err)
		}
	}
	s.c = payloadConfig("spin")
	s.c.Disks = []config.Disk{{Path: path, ReadOnly: true}}
	size := uint64(scatteredFrom) + uint64(len(s.block))*memory.PageSize
	s.c.Memory.Size = config.Bytes((size + memory.LargeFrameSize - 1) &^ (memory.LargeFrameSize - 1))
	return s
}

// content is what a block holds.
func (s *scattered) content(block uint64) []byte {
	b := make([]byte, memory.PageSize)
	for i := 0; i < len(b); i += 512 {
		binary.LittleEndian.PutUint64(b[i:], block*0x9e3779b97f4a7c15+uint64(i)+1)
	}
	return b
}

func (s *scattered) gpa(page int) memory.GPA {
	return scatteredFrom + memory.GPA(page)*memory.PageSize
}

// save makes a snapshot of the machine, each page named by its block.
func (s *scattered) save(t *testing.T) (dir string) {
	t.Helper()
	m := newVM(t, s.c, newConsole())
	ctx := deadline(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	table, layer := m.naming.Table(), names.LayerID(0)
	for i, l := range table.Layers() {
		if l.Title == s.c.Disks[0].Path {
			layer = names.LayerID(i)
		}
	}
	for page, block := range s.block {
		if err := m.mem.WriteAt(s.content(block), s.gpa(page)); err != nil {
			t.Fatal(err)
		}
		if !table.Record(s.gpa(page), names.OfBlock(layer, block)) {
			t.Fatalf("page %d is not named", page)
		}
	}
	dir = filepath.Join(quickDir(t), "snap")
	snapshotOf(t, m, dir, snapshot.None)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

// check compares all pages; those that were given back are zeros.
func (s *scattered) check(t *testing.T, m *VM, gone func(page int) bool) {
	t.Helper()
	zeros := make([]byte, memory.PageSize)
	for page, block := range s.block {
		want := zeros
		if !gone(page) {
			want = s.content(block)
		}
		got, err := m.mem.View(s.gpa(page), memory.PageSize)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != string(want) {
			t.Fatalf("page %d is not what block %d holds (given back: %t)", page, block, gone(page))
		}
	}
}

// TestRestoreMaps: pages that are named in no order, however many, and pages that
// the guest gives back in no order do not use up the mappings that a process may
// have. Were each row mapped, they would.
func TestRestoreMaps(t *testing.T) {
	s := newScattered(t, labtest.Count(8000, 100000), labtest.Count(3000, 4500))
	dir := s.save(t)
	snap, err := snapshot.Open(dir, snapshot.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if h := snap.Manifest().Holds; h.Blocks < uint64(len(s.block))*memory.PageSize {
		t.Errorf("the snapshot holds %+v", h)
	}
	plan, err := snap.Plan(t.Context(), snapshot.PlanOptions{MinPages: 1, MaxMappings: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	unbounded := len(plan.Maps)
	if unbounded < int(s.single)*9/10 {
		t.Errorf("mapped one by one they would take %d mappings: the test shows nothing", unbounded)
	}
	if err := snap.Close(); err != nil {
		t.Fatal(err)
	}

	before := mappings(t)
	m := restoreFrom(t, dir, SnapshotOptions{Config: s.c})
	if err := m.Resume(deadline(t)); err != nil {
		t.Fatal(err)
	}
	s.check(t, m, func(int) bool { return false })
	restored := mappings(t)
	if restored-before < mapMost || restored >= mostMaps {
		t.Errorf("%d mappings after the restore, %d before", restored, before)
	}
	odd := func(page int) bool { return page%2 == 1 }
	for page := range s.block {
		if odd(page) {
			if err := m.mem.Discard(s.gpa(page), memory.PageSize); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.check(t, m, odd)
	given := mappings(t)
	if given >= mostMaps {
		t.Errorf("%d mappings after every other page was given back", given)
	}
	if !t.Failed() {
		labtest.Proof(t, "names-maps", "%d pages named in no order, %d of them single: %d mappings after the restore, %d when every other page was given back, where one by one they would take %d; all pages right", len(s.block), s.single, restored, given, unbounded)
	}
}
