package pvpanic

import "testing"

func TestEvents(t *testing.T) {
	for _, test := range []struct {
		data []byte
		want Event
		says string
	}{
		{[]byte{1}, Panicked, "panicked"},
		{[]byte{2}, CrashLoaded, "crash-loaded"},
		{[]byte{0xfc}, Shutdown, "shutdown"},
		{[]byte{3}, Panicked | CrashLoaded, "panicked+crash-loaded"},
		{[]byte{0}, 0, "none"}, {[]byte{0xf8}, 0, "none"}, {nil, 0, "none"}, {[]byte{1, 0}, 0, "none"},
	} {
		var got Event
		d := New(func(e Event) { got |= e })
		d.WriteRegister(0, test.data)
		if got != test.want || got.String() != test.says {
			t.Errorf("% x: %s", test.data, got)
		}
	}
}

func TestReadTellsWhatIsKnown(t *testing.T) {
	v := []byte{0}
	New(nil).ReadRegister(0, v)
	if v[0] != byte(Panicked|CrashLoaded|Shutdown) {
		t.Errorf("read %#x", v[0])
	}
}
