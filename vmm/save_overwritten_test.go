package vmm

import (
	"os"
	"path/filepath"
	"testing"

	"ditto.vm/internal/labtest"
	"ditto.vm/memory"
	"ditto.vm/migration/snapshot"
)

// overwritePages is how many blocks a test overwrites at once.
const overwritePages = 64

// overwrite writes every block of the disk, as a guest does, from pages of the
// buffers that hold what no block held.
func (r *saveRig) overwrite(page int) {
	r.t.Helper()
	b := make([]byte, overwritePages*memory.PageSize)
	for i := range b {
		b[i] = 0xa5
	}
	r.m.mu.Lock()
	from := r.buffer(page, overwritePages)
	err := r.m.mem.WriteAt(b, from.Start)
	r.m.mem.Wrote(from.Start, from.Size)
	r.m.mu.Unlock()
	if err != nil {
		r.t.Fatal(err)
	}
	for at := int64(0); at < namesDisk; at += int64(from.Size) {
		if err := r.io(1, at, from); err != nil {
			r.t.Fatal(err)
		}
	}
}

// untouched counts the pages of the disk's buffers that nobody has read since the
// restore.
func untouched(t *testing.T, m *VM) (pages uint64) {
	t.Helper()
	touched := m.mem.NewPageSet()
	if err := m.mem.FilesTouched(func(r memory.Range) { touched.Add(r.Start, r.Size) }); err != nil {
		t.Fatal(err)
	}
	return namesDisk/memory.PageSize - touched.CountIn(namesBuffers, namesDisk)
}

// apart forgets the pages that the guest's program and the test's driver wrote:
// all below the working set, and the buffers that were written to the disk.
func (r *saveRig) apart(differ []memory.GFN, page int) (other []memory.GFN) {
	from := r.buffer(page, overwritePages)
	for _, gfn := range differ {
		if gpa := gfn.GPA(); gpa >= ioHeader+512<<10 && (gpa < from.Start || gpa >= from.End()) {
			other = append(other, gfn)
		}
	}
	return other
}

// TestSaveOverwritten: when a restored guest, or the machine that was saved and
// runs on, writes every block of its disk, the pages of the restored one that
// equal these blocks and that nobody has read yet stay what they were. Without
// overlays they do not.
func TestSaveOverwritten(t *testing.T) {
	const page = 8000 // of the buffers, behind what the disk is read into
	r := newSaveRig(t, "spin", nil)
	r.readAll()
	r.write(100, 700, 40) // the disk's content is not all of one age
	r.save("snap", SaveOptions{})
	was, dir := r.watch.takeDump(t), filepath.Join(r.dir, "snap")
	frozen := r.c.Disks[0].Path

	restored := func() *saveRig {
		c := restoredConfig(t, dir)
		m := restoreFrom(t, dir, SnapshotOptions{Config: c})
		if err := m.Resume(deadline(t)); err != nil {
			t.Fatal(err)
		}
		return &saveRig{t: t, m: m, c: c, content: r.content}
	}
	var unread uint64
	unchanged := func(r *saveRig, what string) {
		t.Helper()
		n := untouched(t, r.m)
		if n < namesDisk/memory.PageSize*9/10 {
			t.Errorf("%s: only %d pages were unread when their blocks were written", what, n)
		}
		unread += n
		if other := r.apart(differing(t, r.m.mem, was), page); len(other) > 0 {
			t.Errorf("%s: %d pages are not what they were, the first %s", what, len(other), other[0])
		}
	}

	idle := restored()
	itself := restored()
	itself.drivers = append(itself.drivers, attachPolled(t, itself.m, 0))
	itself.overwrite(page)
	unchanged(itself, "the restored guest writes")
	r.overwrite(page)
	unchanged(idle, "the machine that was saved writes")
	late := restored()
	unchanged(late, "all was written before the restore")

	// What overlays are for: the same writes to the disk as it was.
	broken := restored()
	if n := untouched(t, broken.m); n < namesDisk/memory.PageSize*9/10 {
		t.Fatalf("only %d pages are unread", n)
	}
	content := make([]byte, namesDisk)
	for i := range content {
		content[i] = 0xa5
	}
	f, err := os.OpenFile(frozen, os.O_RDWR, 0)
	if os.IsPermission(err) { // not root: the mode is the safeguard
		if err = os.Chmod(frozen, 0o600); err == nil {
			f, err = os.OpenFile(frozen, os.O_RDWR, 0)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(content, 0); err != nil {
		t.Fatal(err)
	}
	changed := broken.apart(differing(t, broken.m.mem, was), page)
	if len(changed) < namesDisk/memory.PageSize*9/10 {
		t.Errorf("with blocks written in place only %d pages changed: the test shows nothing", len(changed))
	}
	s, err := snapshot.Open(dir, snapshot.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Verify(t.Context(), snapshot.LoadOptions{}); err == nil {
		t.Error("the snapshot is intact with another disk")
	}
	if !t.Failed() {
		labtest.Proof(t, "snapshot-overwritten", "%d blocks written by the restored guest, and by the machine that was saved, while %d pages that equal them were unread: none changed; written in place, below the overlays, %d changed", 2*namesDisk/memory.PageSize, unread, len(changed))
	}
}
