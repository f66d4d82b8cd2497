package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"image/png"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/internal/memmap"
	"ditto.vm/vmm/api"
)

// Memory describes a machine of 4 MiB: a frame that is large, and one that is
// not.
func (m *fakeMachine) Memory(_ context.Context, q api.MemoryQuery) (api.Memory, error) {
	if m.cfg.Name == "broken" {
		return api.Memory{}, errors.New("no pagemap")
	}
	out := api.Memory{
		Bytes: 4 << 20, Mode: api.MemoryQuick, Exact: q.Pause, DurMs: 1500,
		NotPopulatedBytes: 1 << 20, ZeroBytes: 1 << 19, UnknownBytes: 1 << 20,
		Layers:  []api.MemoryLayer{{Title: "/images/base.img", Bytes: 3 << 19, SizeBytes: 1 << 30, Immutable: true, Indexed: true}},
		Frames:  api.MemoryFrames{Total: 2, Large: 1, Small: 1, Reasons: map[string]uint64{"partial": 1}},
		Pages4K: 256, Pages2M: 1, Tracker: api.MemoryTracker{Kind: "wp-async", Sees: "writes", ArmedBytes: 2 << 20},
		Names: api.MemoryNames{Enabled: true, Counters: map[string]uint64{"named": 384, "refuted": 0}},
	}
	if q.Full {
		out.Mode, out.UnknownBytes, out.DuplicateBytes, out.UniqueBytes = api.MemoryFull, 0, 1<<18, 3<<18
		out.Steps = []api.MemoryStep{{Name: "proven"}, {Name: "zero", Bytes: 1 << 19}}
	}
	return out, nil
}

// MemoryMap has the same memory page by page.
func (m *fakeMachine) MemoryMap(_ context.Context, q api.MemoryQuery) (api.MemoryMap, error) {
	if m.cfg.Name == "broken" {
		return api.MemoryMap{CellBytes: 4096, Regions: []api.MemoryRegion{{Bytes: 4 << 20}}, Pages: []byte{1}}, nil
	}
	pages := make([]byte, 1024)
	for i := 512; i < 768; i++ {
		pages[i] = 1
	}
	return api.MemoryMap{
		Mode: api.MemoryFull, Exact: q.Pause, CellBytes: 4096, Regions: []api.MemoryRegion{{Bytes: 4 << 20}}, Pages: pages, Frames: []byte{0x80, 0x50},
		Classes: []api.MemoryClass{{Kind: api.KindNotPopulated, Bytes: 3 << 20}, {Kind: api.KindLayer, Title: "base.img", Bytes: 1 << 20}},
	}, nil
}

func TestInspect(t *testing.T) {
	h := newHost(t)
	done := h.start("a")
	const want = `a: 4MiB of memory, approximate: read while the machine ran (--exact pauses it)

WHAT PAGES EQUAL                 SIZE  PAGES  OF RAM
not populated                    1MiB    256  25.0 %
zeros                          512KiB    128  12.5 %
blocks of base.img (indexed)  1536KiB    384  37.5 %
another page                   256KiB     64   6.2 %
nothing known                  768KiB    192  18.8 %
not looked at                       0      0   0.0 %

HOW THE HOST MAPS THEM  SIZE  FRAMES  OF RAM
large: 2 MiB at once    2MiB       1  50.0 %
small: 4 KiB each       2MiB       1  50.0 %
  partly populated      2MiB       1
empty                      0       0   0.0 %

KVM       256 entries of 4K, 1 of 2M, 0 of 1G
tracker   wp-async: sees writes; 2MiB armed
names     named 384
took      1.5 s; decided by zero 512KiB
`
	if out := h.want("inspect", "a"); out != want {
		t.Errorf("%s", out)
	}
	for _, test := range []struct {
		flag, want string
	}{
		{"--exact", "exact: the machine was paused"}, {"--quick", "as recorded: memory was not read"}, {"--quick", "not looked at                    1MiB"},
	} {
		if out := h.want("inspect", "a", test.flag); !strings.Contains(out, test.want) {
			t.Errorf("%s: %s", test.flag, out)
		}
	}
	var got api.Memory
	if err := json.Unmarshal([]byte(h.want("inspect", "a", "--json")), &got); err != nil || got.Mode != api.MemoryFull || got.Exact || got.Layers[0].Bytes != 3<<19 {
		t.Errorf("%+v, %v", got, err)
	}
	h.want("kill", "a")
	<-done
}

func TestMemoryErrors(t *testing.T) {
	h := newHost(t)
	done := h.start("broken")
	folder := t.TempDir()
	picture := filepath.Join(folder, "a.png")
	for _, test := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"inspect", "gone"}, exit.NotFound, "running: broken"},
		{[]string{"inspect", "broken"}, exit.Failure, "no pagemap"},
		{[]string{"inspect", "broken", "--watch"}, exit.Usage, "--watch needs a terminal"},
		{[]string{"inspect", "broken", "--interval", "1ms"}, exit.Usage, "out of range: use 100ms to 1h"},
		{[]string{"inspect", "broken", "--watch", "--json"}, exit.Usage, "none of the others can be"},
		{[]string{"memmap", "broken"}, exit.Usage, `required flag(s) "output" not set`},
		{[]string{"memmap", "broken", "-o", "map.jpg"}, exit.Usage, "end in .png or .svg"},
		{[]string{"memmap", "broken", "-o", "map"}, exit.Usage, "end in .png or .svg"},
		{[]string{"memmap", "broken", "-o", folder}, exit.Usage, "is not a file"},
		{[]string{"memmap", "broken", "-o", "map.png", "--format", "pdf"}, exit.Usage, "end in .png or .svg"},
		{[]string{"memmap", "gone", "-o", picture}, exit.NotFound, "running: broken"},
		{[]string{"memmap", "broken", "-o", picture}, exit.Failure, "classes"},
	} {
		code, out, errs := h.do(test.args...)
		if code != test.code || !strings.Contains(errs, test.want) || strings.Count(errs, "\n") != 1 || out != "" {
			t.Errorf("ditto %s: code %d, want %d; %q, want one line with %q; output %q", strings.Join(test.args, " "), code, test.code, errs, test.want, out)
		}
	}
	if left, err := os.ReadDir(folder); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	h.want("kill", "broken")
	<-done
}

func TestMemmap(t *testing.T) {
	h := newHost(t)
	done := h.start("a")
	folder := t.TempDir()
	file := filepath.Join(folder, "A.PNG")
	if out := h.want("memmap", "a", "-o", file); !strings.HasPrefix(out, file+": ") {
		t.Errorf("%q", out)
	}
	written, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	img, err := png.Decode(bytes.NewReader(written))
	if err != nil {
		t.Fatal(err)
	}
	// The first frame is large and the second small and half of base.img.
	answer, _ := (&fakeMachine{}).MemoryMap(t.Context(), api.MemoryQuery{})
	l := memmap.NewLayout(asPicture("a", answer, time.Now()))
	large, _ := l.Tile(0)
	small, _ := l.Tile(2 << 20)
	if img.At(large.Min.X-1, large.Min.Y) == img.At(small.Min.X-1, small.Min.Y) {
		t.Error("large and small frames look alike")
	}
	if img.At(small.Min.X, small.Min.Y) == img.At(small.Min.X, small.Max.Y-1) {
		t.Error("a block and an absent page look alike")
	}
	if out := h.want("memmap", "a", "-o", "-"); !strings.HasPrefix(out, "\x89PNG") {
		t.Errorf("%.20q", out)
	}
	for _, args := range [][]string{{"-o", "-", "--format", "svg"}, {"-o", filepath.Join(folder, "a.svg"), "--exact"}} {
		out := h.want(append([]string{"memmap", "a"}, args...)...)
		if args[1] != "-" {
			written, err := os.ReadFile(args[1])
			if out = string(written); err != nil {
				t.Fatal(err)
			}
		}
		if !strings.HasPrefix(out, "<svg ") || !strings.Contains(out, "Memory of a: 4 MiB") {
			t.Errorf("%v: %.60q", args, out)
		}
	}
	if left, err := os.ReadDir(folder); err != nil || len(left) != 2 {
		t.Errorf("files %v, %v", left, err)
	}

	// A terminal is no place for a picture.
	user, tty := openPTY(t)
	defer user.Close()
	var errs bytes.Buffer
	if code := h.env(tty, &errs).Execute(t.Context(), []string{"memmap", "a", "-o", "-"}); code != exit.Usage || !strings.Contains(errs.String(), "redirect the output") {
		t.Errorf("code %d: %s", code, errs.String())
	}
	if err := tty.Close(); err != nil {
		t.Error(err)
	}
	h.want("kill", "a")
	<-done
}

// openPTY opens a terminal of 40 columns and 12 rows.
func openPTY(t *testing.T) (user, tty *os.File) {
	t.Helper()
	user, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(user.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(user.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 12, Col: 40}); err != nil {
		t.Fatal(err)
	}
	return user, tty
}

// TestWatch: Ctrl-C ends it without an error, the terminal is given back, and
// what was shown last stays. A machine that ends meanwhile ends it too.
func TestWatch(t *testing.T) {
	h := newHost(t)
	for _, machineEnds := range []bool{false, true} {
		done := h.start("a")
		user, tty := openPTY(t)
		ctx, cancel := context.WithCancel(t.Context())
		var errs bytes.Buffer
		result := make(chan int)
		go func() {
			result <- h.env(tty, &errs).Execute(ctx, []string{"inspect", "a", "--watch", "--interval", "100ms"})
			_ = tty.Close()
		}()
		shown := &screenText{}
		read := make(chan struct{})
		go func() {
			defer close(read)
			_, _ = io.Copy(shown, user) // ends with the terminal
		}()
		shown.await(t, home+"a: 4MiB")
		if machineEnds {
			h.want("kill", "a")
		} else {
			cancel()
		}
		if code := <-result; code != exit.OK {
			t.Errorf("code %d: %s", code, errs.String())
		}
		<-read
		if got := errs.String(); machineEnds != strings.Contains(got, "a has ended") {
			t.Errorf("%q", got)
		}
		_, after, found := strings.Cut(shown.String(), firstScreen)
		if !found || !strings.HasPrefix(after, "a: 4MiB of memory") || !strings.Contains(after, "KVM ") {
			t.Errorf("left on the terminal: %q", after)
		}
		_ = user.Close()
		if !machineEnds {
			h.want("kill", "a")
		}
		<-done
		cancel()
	}
}

func TestClip(t *testing.T) {
	for _, test := range []struct {
		columns, rows int
		want          string
	}{
		{0, 0, "\x1b[Häbc\x1b[K\r\ndefg\x1b[K\x1b[J"},
		{2, 9, "\x1b[Häb\x1b[K\r\nde\x1b[K\x1b[J"},
		{9, 1, "\x1b[Häbc\x1b[K\x1b[J"},
	} {
		if got := clip("äbc\ndefg", test.columns, test.rows); got != test.want {
			t.Errorf("%d x %d: %q, want %q", test.columns, test.rows, got, test.want)
		}
	}
}
