package bench

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func sh(t *testing.T, script string, input bool) *child {
	t.Helper()
	c, err := startChild([]string{"/bin/sh", "-c", script}, input)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.stop)
	return c
}

func TestChildWaitsForMarker(t *testing.T) {
	c := sh(t, "printf 'one two'; cat", true)
	end, at, err := c.waitFor(t.Context(), 0, "one")
	if err != nil {
		t.Fatal(err)
	}
	if at.Before(c.started) {
		t.Errorf("read %s before the start", c.started.Sub(at))
	}
	if _, err := c.stdin.WriteString("one again\n"); err != nil {
		t.Fatal(err)
	}
	again, _, err := c.waitFor(t.Context(), end, "one")
	if err != nil {
		t.Fatal(err)
	}
	if got := c.out.slice(0, again); got != "one twoone" {
		t.Errorf("output %q", got)
	}
}

func TestChildThatEnds(t *testing.T) {
	c := sh(t, "echo nothing; echo the reason >&2; exit 3", false)
	_, _, err := c.waitFor(t.Context(), 0, "something")
	if !errors.Is(err, errEnded) || !strings.Contains(err.Error(), "the reason") {
		t.Errorf("error %v", err)
	}
	<-c.ended
	if c.err == nil {
		t.Error("the exit status was lost")
	}
}

func TestChildWaitIsLimited(t *testing.T) {
	c := sh(t, "exec sleep 100", false)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("enough"))
	if _, _, err := c.waitFor(ctx, 0, "x"); err == nil || !strings.Contains(err.Error(), "enough") {
		t.Errorf("error %v", err)
	}
}

// stop must reach what the program itself started.
func TestStopKillsTheGroup(t *testing.T) {
	c := sh(t, "sleep 1000 & echo pid $! .; wait", false)
	end, _, err := c.waitFor(t.Context(), 0, " .")
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.Fields(c.out.slice(0, end))[1])
	if err != nil {
		t.Fatal(err)
	}
	c.stop()
	c.stop() // again, for nothing
	// The sleep has been killed; its reaper may still be at work.
	for {
		state, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil || strings.Contains(string(state), ") Z ") || strings.Contains(string(state), ") X ") {
			return
		}
		if err := syscall.Kill(pid, 0); errors.Is(err, syscall.ESRCH) {
			return
		}
		if t.Context().Err() != nil {
			t.Fatal("the grandchild lives on")
		}
		time.Sleep(time.Millisecond)
	}
}

func TestStartOfNothing(t *testing.T) {
	if _, err := startChild([]string{"/nonexistent/program"}, true); err == nil {
		t.Error("no error")
	}
}

func TestConsoleTimesTheChunk(t *testing.T) {
	c := newConsole()
	begin := time.Now()
	c.add([]byte("ab"), begin)
	c.add([]byte("cd"), begin.Add(time.Second))
	for _, test := range []struct {
		marker string
		want   time.Duration
	}{{"ab", 0}, {"bc", time.Second}, {"d", time.Second}} {
		_, at, err := c.find(t.Context(), 0, test.marker)
		if err != nil || at.Sub(begin) != test.want {
			t.Errorf("%q found after %s, %v; want %s", test.marker, at.Sub(begin), err, test.want)
		}
	}
}

func TestTailKeepsTheEnd(t *testing.T) {
	var w tail
	for range 1000 {
		if _, err := w.Write([]byte("0123456789")); err != nil {
			t.Fatal(err)
		}
	}
	if got := w.String(); len(got) != tailBytes || !strings.HasSuffix(got, "789") {
		t.Errorf("%d bytes, ending in %q", len(got), got[len(got)-3:])
	}
}

// A shell on a pipe prints no prompt; the rest of the conversation is the one
// with a guest.
func TestShellGuest(t *testing.T) {
	g := &shellGuest{child: sh(t, "sh", true)}
	for _, test := range []struct {
		line, want, fails string
	}{
		{"echo hello; echo world", "hello\nworld", ""},
		{"true", "", ""},
		{"echo bad; false", "bad", "status 1: bad"},
	} {
		got, err := g.run(t.Context(), test.line)
		if got != test.want {
			t.Errorf("%q printed %q, want %q", test.line, got, test.want)
		}
		if (err == nil) != (test.fails == "") || err != nil && !strings.Contains(err.Error(), test.fails) {
			t.Errorf("%q: error %v, want %q", test.line, err, test.fails)
		}
	}
	if _, err := g.run(t.Context(), "exit 5"); !errors.Is(err, errEnded) {
		t.Errorf("the end of the guest: %v", err)
	}
}
