package trackertest_test

import (
	"errors"
	"os"
	"testing"

	"ditto.vm/guest/payload"
	"ditto.vm/internal/labtest"
	"ditto.vm/internal/trackertest"
	"ditto.vm/memory"
)

const (
	page  = memory.PageSize
	frame = memory.LargeFrameSize

	// reserved is the top of RAM, where the VMM writes and the guest does not.
	reserved = 8 << 20
	// guestStart is where the guest's working set begins.
	guestStart = 4 << 20
)

// machine is a Machine whose failures end the test.
type machine struct {
	*trackertest.Machine
	t testing.TB
}

// newMachine makes a machine that is stopped, with the tracker open. Without
// KVM, or without the tracker, the test is skipped.
func newMachine(t testing.TB, config memory.Config, kind memory.TrackerKind) *machine {
	t.Helper()
	m, err := trackertest.OpenMachine(trackertest.MachineConfig{Memory: config, Tracker: kind})
	if err != nil {
		skipOrFail(t, err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return &machine{Machine: m, t: t}
}

// skipOrFail skips where kernel or KVM lack what is needed, with the cure. KVM
// itself may be required.
func skipOrFail(t testing.TB, err error) {
	t.Helper()
	switch {
	case errors.Is(err, memory.ErrUnsupported):
		t.Skipf("%v; try: Linux 6.7 or newer, with KVM_CAP_DIRTY_LOG_RING", err)
	case os.Getenv(labtest.EnvRequireKVM) == "":
		t.Skipf("%v; try: run as a member of the kvm group on a machine with KVM", err)
	}
	t.Fatal(err)
}

func (m *machine) load(c payload.MemWriterConfig) {
	m.t.Helper()
	if err := m.Load(c); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) command(c payload.Command, until payload.State) payload.MemWriterStatus {
	m.t.Helper()
	s, err := m.Command(m.t.Context(), c, until)
	if err != nil {
		m.t.Fatal(err)
	}
	return s
}

func (m *machine) await(wanted func(payload.MemWriterStatus) bool) payload.MemWriterStatus {
	m.t.Helper()
	s, err := m.Await(m.t.Context(), wanted)
	if err != nil {
		m.t.Fatal(err)
	}
	return s
}

// finish ends the program, which checks its memory first.
func (m *machine) finish() {
	m.t.Helper()
	if _, err := m.Finish(m.t.Context()); err != nil {
		m.t.Error(err)
	}
}

// mapped returns with how many 4 KiB and 2 MiB entries KVM maps guest memory.
func (m *machine) mapped() (small, large uint64) {
	m.t.Helper()
	small, large, err := m.Mapped()
	if err != nil {
		m.t.Fatal(err)
	}
	return small, large
}
