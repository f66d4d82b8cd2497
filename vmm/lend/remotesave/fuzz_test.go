package remotesave

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ditto.vm/vmm/savehost"
)

// strictHost fails the test when it is asked for what no save wants.
type strictHost struct{ t *testing.T }

var errNothing = errors.New("nothing is done")

func (h strictHost) file(name string) (*os.File, error) {
	dir, base := filepath.Split(name)
	if dir != "" && dir != "sections/" || base == "" || strings.HasPrefix(base, ".") || len(name) > 100 {
		h.t.Errorf("a file %q", name)
	}
	return nil, errNothing
}

func (h strictHost) Create(name string) (*os.File, error)              { return h.file(name) }
func (h strictHost) OpenSnapshotFile(_, name string) (*os.File, error) { return h.file(name) }
func (h strictHost) Commit() error                                     { return errNothing }
func (h strictHost) Abort() error                                      { return errNothing }
func (h strictHost) DropOverlay(int) error                             { return errNothing }
func (h strictHost) Overlay(_ context.Context, r savehost.OverlayRequest) (savehost.Overlay, error) {
	if !filepath.IsAbs(r.Below) || r.Disk < 0 || r.Size <= 0 || strings.ContainsRune(r.Below, 0) {
		h.t.Errorf("an overlay %+v", r)
	}
	return savehost.Overlay{}, errNothing
}

// FuzzAnswer: whatever a machine asks for, the host sees only what a save may
// want.
func FuzzAnswer(f *testing.F) {
	for _, seed := range []struct{ what, args string }{
		{askCreate, `{"name":"sections/cpu"}`},
		{askCreate, `{"name":"../pages"}`},
		{askOpen, `{"dir":"/parent","name":"workingset"}`},
		{askOverlay, `{"disk":1,"below":"/d","format":"raw","size":4096,"direct":true}`},
		{askDropOverlay, `{"disk":1}`},
		{askCommit, ``}, {askAbort, `null`}, {"shell", `{}`},
	} {
		f.Add(seed.what, []byte(seed.args))
	}
	f.Fuzz(func(t *testing.T, what string, args []byte) {
		l := &lender{host: strictHost{t}}
		reply, files, err := l.answer(t.Context(), what, json.RawMessage(args))
		if err == nil || reply != nil || files != nil {
			t.Errorf("%s %q: %v, %v", what, args, reply, err)
		}
		l.event(args)
	})
}
