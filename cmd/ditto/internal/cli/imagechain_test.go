package cli

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ditto.vm/cmd/ditto/internal/exit"
)

func TestImageRebase(t *testing.T) {
	h := newHost(t)
	dir := t.TempDir()
	base, moved, top := filepath.Join(dir, "base.img"), filepath.Join(dir, "moved.img"), filepath.Join(dir, "top.qcow2")
	writeImage(t, base)
	h.want("image", "overlay", top, base)
	if err := os.Rename(base, moved); err != nil {
		t.Fatal(err)
	}
	fail := func(code int, want string, args ...string) {
		t.Helper()
		got, out, errs := h.do(append([]string{"image", "rebase"}, args...)...)
		if got != code || out != "" || !strings.Contains(errs, want) || strings.Count(errs, "\n") != 1 {
			t.Errorf("%v: code %d, %q, %q", args, got, out, errs)
		}
	}
	fail(exit.Disk, "does not exist", top, moved)
	fail(exit.Usage, "--alone", top)
	fail(exit.Usage, "--alone", "--alone", top, moved)
	if out := h.want("image", "rebase", "--unsafe", top, moved); out != top+" is stacked on "+moved+"\n" {
		t.Errorf("%q", out)
	}
	layers := func() (got []imageLayer) {
		t.Helper()
		if err := json.Unmarshal([]byte(h.want("image", "info", "--json", top)), &got); err != nil {
			t.Fatal(err)
		}
		return got
	}
	if got := layers(); len(got) != 2 || got[1].Path != moved {
		t.Errorf("%+v", got)
	}
	code, out, errs := h.do("image", "rebase", "--alone", top)
	if code != 0 || out != top+" is stacked on nothing\n" || errs != "" {
		t.Errorf("code %d, %q, %q", code, out, errs)
	}
	if got := layers(); len(got) != 1 || got[0].FileBytes < 3<<20 {
		t.Errorf("%+v", got)
	}
}
