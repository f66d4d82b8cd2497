package memory_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ditto.vm/internal/trackertest"
	"ditto.vm/memory"
)

// TestMapFiles: files that are mapped over memory are read, not written, and are
// gone where pages were given back.
func TestMapFiles(t *testing.T) {
	s := newSpace(t, memory.Config{Size: 4 * frame})
	content := bytes.Repeat([]byte("a page of a file"), 2*frame/16)
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	f := newFrames(t, s, open(t, s, memory.TrackerNone))
	hva := s.Regions()[0].HVA
	if err := s.MapFiles(
		memory.FileRange{Range: memory.Range{Start: frame + 3*page, Size: 100 * page}, File: file, Offset: 5 * page},
		memory.FileRange{Range: memory.Range{Start: 2 * frame, Size: frame}, File: file, Offset: frame},
		memory.FileRange{Range: memory.Range{Start: 0, Size: 0}, File: file},
	); err != nil {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	if s.Regions()[0].HVA != hva {
		t.Error("memory has moved")
	}
	model := make([]byte, 4*frame)
	copy(model[frame+3*page:], content[5*page:105*page])
	copy(model[2*frame:], content[frame:])
	check := func(what string) {
		t.Helper()
		if got, err := s.View(0, 4*frame); err != nil || !bytes.Equal(got, model) {
			t.Errorf("%s: memory differs, %v", what, err)
		}
		if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, content) {
			t.Errorf("%s: the file was changed, %v", what, err)
		}
	}
	check("mapped")
	for gpa, reason := range map[memory.GPA]memory.FrameReasons{0: 0, frame: memory.ReasonRemap, 2 * frame: memory.ReasonRemap, 3 * frame: 0} {
		if _, why, _ := f.At(gpa); why&memory.ReasonRemap != reason {
			t.Errorf("frame %s is %s", gpa, why)
		}
	}
	write := func(gpa memory.GPA) {
		t.Helper()
		if err := s.WriteAt([]byte("the guest's"), gpa); err != nil {
			t.Fatal(err)
		}
		copy(model[gpa:], "the guest's")
	}
	write(frame + 4*page)
	write(2*frame + page)
	check("written")
	discard := func(gpa memory.GPA, n uint64) {
		t.Helper()
		if err := s.Discard(gpa, n); err != nil {
			t.Fatal(err)
		}
		clear(model[gpa : uint64(gpa)+n])
	}
	discard(frame, 10*page) // partly the file's
	discard(2*frame+page, page)
	check("given back")
	write(2*frame + page)
	discard(2*frame, frame)
	check("given back whole")
	if _, why, _ := f.At(2 * frame); why&memory.ReasonRemap != 0 {
		t.Errorf("a frame that is no file's is held: %s", why)
	}
	if err := s.Clear(); err != nil {
		t.Fatal(err)
	}
	clear(model)
	check("emptied")
	if usage, err := s.HostUsage(); err != nil || usage.VMAs != 1 {
		t.Errorf("%d mappings, %v", usage.VMAs, err)
	}
}

// TestMapFilesHoles: a guest that gives back every other page of a file costs no
// more mappings than are allowed, and gets zeros.
func TestMapFilesHoles(t *testing.T) {
	const size = 320 << 20
	s := newSpace(t, memory.Config{Size: size})
	file, err := os.OpenFile(filepath.Join(t.TempDir(), "file"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := file.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if err := s.MapFiles(memory.FileRange{Range: memory.Range{Start: 0, Size: size}, File: file}); err != nil {
		t.Fatal(err)
	}
	for gpa := memory.GPA(page); gpa < size; gpa += 2 * page {
		if err := s.WriteAt([]byte{1}, gpa); err != nil {
			t.Fatal(err)
		}
		if err := s.Discard(gpa, page); err != nil {
			t.Fatal(err)
		}
		if got, err := s.View(gpa, 1); err != nil || got[0] != 0 {
			t.Fatalf("page %s has old bytes, %v", gpa.GFN(), err)
		}
	}
	usage, err := s.HostUsage()
	if err != nil || usage.VMAs > 33000 {
		t.Errorf("%d mappings, %v", usage.VMAs, err)
	}
	// The others are given back too, and the number falls.
	if err := s.Discard(0, size); err != nil {
		t.Fatal(err)
	}
	if usage, err := s.HostUsage(); err != nil || usage.VMAs != 1 {
		t.Errorf("%d mappings at the end, %v", usage.VMAs, err)
	}
}

// heard is an observer that notes what it is told.
type heard struct{ written, remapped *memory.PageSet }

func (h heard) HostWrite(gpa memory.GPA, n uint64) { h.written.Add(gpa, n) }

func (h heard) Remapped(r memory.Range) error {
	h.remapped.Add(r.Start, r.Size)
	return nil
}

// TestMapFilesTells: the tracker hears of every new mapping, and of what was
// given back.
func TestMapFilesTells(t *testing.T) {
	l := newLayout(t, memory.Config{Size: 4 * frame}, 23)
	h := heard{l.space.NewPageSet(), l.space.NewPageSet()}
	l.space.SetObserver(h)
	defer l.space.SetObserver(nil)
	told := func(what string, mapped, written memory.Range) {
		t.Helper()
		for set, want := range map[*memory.PageSet]memory.Range{h.remapped: mapped, h.written: written} {
			if n := set.Count(); n != want.Size/page || set.CountIn(want.Start, want.Size) != n {
				t.Errorf("%s: told of %d pages, want %d", what, n, want.Size/page)
			}
			set.Clear()
		}
	}
	again, err := os.Open(l.path)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	row := memory.Range{Start: l.mapped[0].Start, Size: 2 * page}
	if err := l.space.MapFiles(memory.FileRange{Range: row, File: again}); err != nil {
		t.Fatal(err)
	}
	told("mapped", row, memory.Range{})
	if err := l.space.Discard(row.Start, row.Size); err != nil {
		t.Fatal(err)
	}
	told("given back", row, row)
	if err := l.space.Discard(row.Start, row.Size); err != nil {
		t.Fatal(err)
	}
	told("given back again", memory.Range{}, row)
	if err := l.space.Clear(); err != nil {
		t.Fatal(err)
	}
	told("emptied", l.space.Regions()[0].Range, l.space.Regions()[0].Range)
}

// TestDiscardMeetsCollect: a tracker that looks while mapped and missing pages are
// given back never finds memory that it does not know.
func TestDiscardMeetsCollect(t *testing.T) {
	l := newLayout(t, memory.Config{Size: 8 * frame}, 29)
	missing(t, l.space, l.src, l.waiting, memory.MissingOptions{})
	tr := open(t, l.space, memory.TrackerWPAsync)
	all := l.space.Regions()[0].Range
	done := make(chan error, 1)
	go func() {
		var errs []error
		for gpa := memory.GPA(0); gpa < 8*frame; gpa += 3 * page {
			errs = append(errs, l.space.Discard(gpa, page))
		}
		done <- errors.Join(errs...)
	}()
	for {
		if err := tr.Collect(all, l.space.NewPageSet(), memory.Rearm); err != nil {
			t.Error(err)
		}
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
			return
		default:
		}
	}
}

// TestMapFilesRefuses: what cannot be mapped is refused before anything is.
func TestMapFilesRefuses(t *testing.T) {
	s := newSpace(t, memory.Config{Size: frame})
	path := filepath.Join(t.TempDir(), "short")
	if err := os.WriteFile(path, make([]byte, 10*page), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for want, r := range map[string]memory.FileRange{
		"cut short":     {Range: memory.Range{Size: 10 * page}, Offset: page},
		"page-aligned":  {Range: memory.Range{Size: page}, Offset: 100},
		"negative":      {Range: memory.Range{Size: page}, Offset: -page},
		"not page":      {Range: memory.Range{Start: 1, Size: page}},
		"outside guest": {Range: memory.Range{Start: frame, Size: page}},
		"short":         {Range: memory.Range{Size: page}, Offset: 1 << 62},
	} {
		r.File = file
		if want == "negative" {
			want = "page-aligned"
		}
		good := memory.FileRange{Range: memory.Range{Size: page}, File: file}
		if err := s.MapFiles(good, r); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", r, err, want)
		}
	}
	if usage, err := s.HostUsage(); err != nil || usage.VMAs != 1 {
		t.Errorf("%d mappings, %v", usage.VMAs, err)
	}
}

// TestTrackMapped: whatever is mapped or missing, a tracker omits no write, while
// pages arrive and are given back; and it does not report what only arrives.
func TestTrackMapped(t *testing.T) {
	for _, late := range []bool{false, true} { // the tracker is opened after the service
		l := newLayout(t, memory.Config{Size: 12 * frame}, 17)
		s := l.space
		var tr memory.Tracker
		if !late {
			tr = open(t, s, memory.TrackerWPAsync)
		}
		m := missing(t, s, l.src, l.waiting, memory.MissingOptions{})
		if late {
			tr = open(t, s, memory.TrackerWPAsync)
		}
		all := s.Regions()[0].Range

		// Everything that holds something was never armed.
		first := s.NewPageSet()
		if err := tr.Collect(all, first, memory.Peek); err != nil {
			t.Fatal(err)
		}
		for _, r := range l.waiting {
			if n := first.CountIn(r.Start, r.Size); n != r.Size/page {
				t.Fatalf("%d of %d pages that wait are reported before they were armed", n, r.Size/page)
			}
		}
		for _, r := range l.mapped {
			if n := first.CountIn(r.Start, r.Size); n != r.Size/page {
				t.Fatalf("%d of %d pages of files are reported before they were armed", n, r.Size/page)
			}
		}
		if err := tr.Arm(all); err != nil {
			t.Fatal(err)
		}
		// Half of it arrives armed, and nothing is written.
		if err := m.Fetch(t.Context(), memory.Range{Start: 0, Size: 6 * frame}); err != nil {
			t.Fatal(err)
		}
		quiet := s.NewPageSet()
		if err := tr.Collect(all, quiet, memory.Rearm); err != nil {
			t.Fatal(err)
		}
		if n := quiet.Count(); n != 0 {
			t.Errorf("late=%v: %d pages are reported that only arrived", late, n)
		}
		// What waits and is disarmed counts as written again.
		rest := memory.Range{Start: 6 * frame, Size: 6 * frame}
		if err := tr.Disarm(rest); err != nil {
			t.Fatal(err)
		}
		disarmed := s.NewPageSet()
		if err := tr.Collect(rest, disarmed, memory.Peek); err != nil {
			t.Fatal(err)
		}
		if waiting := m.Stats().Waiting / page; waiting == 0 || disarmed.Count() < waiting {
			t.Errorf("%d pages are reported after they were disarmed, and %d wait", disarmed.Count(), waiting)
		}
		mirror, err := trackertest.NewMirror(s, tr)
		if err != nil {
			t.Fatal(err)
		}
		rng := rand.New(rand.NewPCG(1, 1))
		for range 40 {
			for range 50 {
				gpa := memory.GPA(rng.Uint64N(12*frame) &^ 7)
				if rng.IntN(20) == 0 {
					err = s.Discard(gpa&^(page-1), (1+rng.Uint64N(30))*page)
				} else {
					var word []byte
					if word, err = s.Writable(gpa, 8); err == nil { // as a vCPU does: nobody is told
						word[0]++
					}
				}
				if err != nil && gpa < 12*frame-31*page {
					t.Fatal(err)
				}
			}
			if _, err := mirror.Round(memory.Rearm); err != nil {
				t.Fatal(err)
			}
			if err := mirror.Check(); err != nil {
				t.Fatal(err)
			}
		}
	}
}
