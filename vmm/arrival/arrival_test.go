package arrival

import (
	"context"
	"errors"
	"os"
	"testing"

	"ditto.vm/memory"
	"ditto.vm/migration/live"
	"ditto.vm/migration/state"
)

// step is an arrival that fails when it is told to.
type step struct {
	live.Arrival
	construct, run error
}

func (s step) Construct(context.Context, []state.Section, *memory.PageSet, memory.PageSource) error {
	return s.construct
}
func (s step) Run(context.Context) error { return s.run }

func TestWatched(t *testing.T) {
	broken := errors.New("broken")
	for _, test := range []struct {
		step        step
		constructed error
		want        string
		err         error
	}{
		{step{}, nil, "constructed running ", nil},
		{step{construct: broken}, nil, "", broken},
		{step{}, broken, "constructed ", broken},
		{step{run: broken}, nil, "constructed ", broken},
	} {
		said := ""
		w := Watched{
			Arrival:     test.step,
			Constructed: func() error { said += "constructed "; return test.constructed },
			Running:     func() { said += "running " },
		}
		err := w.Construct(t.Context(), nil, nil, nil)
		if err == nil {
			err = w.Run(t.Context())
		}
		if !errors.Is(err, test.err) || said != test.want {
			t.Errorf("%+v: %q, %v", test, said, err)
		}
	}
}

func TestCanFetch(t *testing.T) {
	err := CanFetch()
	switch {
	case err == nil:
	case errors.Is(err, memory.ErrUnsupported) && os.Getenv("DITTO_REQUIRE_KVM") == "":
		t.Skipf("%v; try: chmod 666 /dev/userfaultfd", err)
	default:
		t.Error(err)
	}
}
