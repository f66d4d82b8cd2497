package lend

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestDecode(t *testing.T) {
	for _, test := range []struct {
		in    string
		files int
		want  string // in the error, "" for none
	}{
		{`{"kind":"hello","version":1,"name":"snapshot","body":{"a":1}}`, 0, ""},
		{`{"kind":"ask","id":7,"name":"create","body":{}}`, 0, ""},
		{`{"kind":"ask","id":7,"name":"abort"}`, 0, ""},
		{`{"kind":"answer","id":7,"files":2}`, 2, ""},
		{`{"kind":"answer","id":7,"failure":{"text":"no","kinds":["busy"],"errno":28}}`, 0, ""},
		{`{"kind":"cancel"}`, 0, ""},
		{`{"kind":"event","body":[1]}`, 0, ""},
		{`{"kind":"end","body":null}`, 0, ""},
		{`{"kind":"end","failure":{"text":""}}`, 0, ""},

		{``, 0, "end of JSON"},
		{`[]`, 0, "cannot unmarshal"},
		{`{}`, 0, "unknown kind"},
		{`{"kind":"go"}`, 0, "unknown kind"},
		{`{"kind":"cancel"} {}`, 0, "after top-level value"},
		{`{"kind":"cancel","more":1}`, 0, "unknown field"},
		{`{"kind":"hello","version":2,"name":"x","later":1}`, 0, "version 2, and this process speaks 1: use the ditto"},
		{`{"kind":"hello","name":"x"}`, 0, "version 0"},
		{`{"kind":"hello","version":1}`, 0, "the name"},
		{`{"kind":"hello","version":1,"name":"../x"}`, 0, "the name"},
		{`{"kind":"hello","version":1,"name":"` + strings.Repeat("a", MaxName+1) + `"}`, 0, "the name"},
		{`{"kind":"ask","id":7,"name":"x","files":1}`, 1, "cannot have"},
		{`{"kind":"ask","name":"x"}`, 0, "no number"},
		{`{"kind":"ask","id":-1,"name":"x"}`, 0, "cannot unmarshal"},
		{`{"kind":"ask","id":7,"name":"x","failure":{"text":"no"}}`, 0, "cannot have"},
		{`{"kind":"event","id":7}`, 0, "cannot have"},
		{`{"kind":"answer","id":7,"files":1}`, 2, "1 descriptors and comes with 2"},
		{`{"kind":"answer","id":7,"files":5}`, 5, "5 descriptors"},
		{`{"kind":"answer","id":7}`, 1, "0 descriptors"},
		{`{"kind":"answer","id":7,"body":1,"failure":{"text":"no"}}`, 0, "has failed and has not"},
		{`{"kind":"answer","id":7,"files":1,"failure":{"text":"no"}}`, 1, "has failed and has not"},
		{`{"kind":"end","failure":{"text":"no","errno":-1}}`, 0, "the error number"},
		{`{"kind":"end","failure":{"text":"no","errno":5000}}`, 0, "the error number"},
		{`{"kind":"end","failure":{"text":"no","kinds":["A"]}}`, 0, "the name of an error"},
		{`{"kind":"end","failure":{"text":"` + strings.Repeat("a", maxText+1) + `"}}`, 0, "too long"},
		{`{"kind":"event","body":"` + strings.Repeat("a", MaxMessage) + `"}`, 0, "more than"},
	} {
		_, err := decode([]byte(test.in), test.files)
		switch {
		case test.want == "" && err != nil:
			t.Errorf("%.100s: %v", test.in, err)
		case test.want != "" && (!errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), test.want)):
			t.Errorf("%.100s: %v, want %q", test.in, err, test.want)
		}
	}
}

// FuzzDecode: what is decoded is within bounds, and is decoded to the same again.
func FuzzDecode(f *testing.F) {
	for _, seed := range []string{
		`{"kind":"hello","version":1,"name":"snapshot","body":{"a":1}}`,
		`{"kind":"ask","id":7,"name":"create","body":{}}`,
		`{"kind":"answer","id":7,"files":2}`,
		`{"kind":"answer","id":7,"failure":{"text":"no","kinds":["busy"],"errno":28}}`,
		`{"kind":"cancel"}`, `{"kind":"event","body":[1]}`, `{"kind":"end","body":null}`,
	} {
		f.Add([]byte(seed), 0)
		f.Add([]byte(seed), 2)
	}
	f.Fuzz(func(t *testing.T, b []byte, files int) {
		m, err := decode(b, files)
		if err != nil {
			if !errors.Is(err, ErrProtocol) {
				t.Errorf("%v", err)
			}
			return
		}
		if m.Files != files || files > MaxFiles || len(m.Name) > MaxName || m.Failure != nil && len(m.Failure.Text) > maxText {
			t.Fatalf("out of bounds: %+v", m)
		}
		again, err := m.encode()
		if err != nil {
			return // spelled out it may be longer
		}
		second, err := decode(again, files)
		if err != nil {
			t.Fatalf("%s: %v", again, err)
		}
		third, err := second.encode()
		if diff := cmp.Diff(string(again), string(third)); diff != "" || err != nil {
			t.Errorf("%v\n%s", err, diff)
		}
	})
}

// TestFailures: errors that both ends know arrive as what they are.
func TestFailures(t *testing.T) {
	errBusy, errOther := errors.New("busy"), errors.New("other")
	kinds := Kinds{"busy": errBusy, "exists": fs.ErrExist}
	sent := fmt.Errorf("create\nit: %w, %w, %w, %w", errBusy, unix.ENOSPC, context.Canceled, errOther)
	got := kinds.unpack(kinds.pack(sent))
	if got.Error() != strings.ReplaceAll(sent.Error(), "\n", " ") {
		t.Errorf("%q", got)
	}
	for err, want := range map[error]bool{
		errBusy: true, unix.ENOSPC: true, context.Canceled: true,
		errOther: false, fs.ErrExist: false, context.DeadlineExceeded: false,
	} {
		if errors.Is(got, err) != want {
			t.Errorf("is %v: %v, want %v", err, !want, want)
		}
	}
	if (Kinds{}).unpack(kinds.pack(errBusy)); errors.Is(Kinds{}.unpack(kinds.pack(errBusy)), errBusy) {
		t.Error("a kind that this end does not know is known")
	}
	long := kinds.pack(errors.New(strings.Repeat("é", maxText)))
	if err := long.check(); err != nil || len(long.Text) == 0 {
		t.Errorf("a long error: %d bytes, %v", len(long.Text), err)
	}
}
