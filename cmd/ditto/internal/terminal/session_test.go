package terminal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// openTerminal returns the two ends of a pseudo-terminal.
func openTerminal(t *testing.T) (user, tty *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("%v; try: mount -t devpts devpts /dev/pts", err)
	}
	user = os.NewFile(uintptr(fd), "ptmx")
	t.Cleanup(func() { _ = user.Close() })
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tty.Close() })
	return user, tty
}

func termios(t *testing.T, f *os.File) unix.Termios {
	t.Helper()
	state, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return *state
}

// buffer is a bytes.Buffer for several goroutines.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// consolePair returns the two ends of a console connection.
func consolePair(t *testing.T) (session, guest net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "console")
		conns[i], err = net.FileConn(f)
		_ = f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conns[i].Close() })
	}
	return conns[0], conns[1]
}

func TestSession(t *testing.T) {
	for _, test := range []struct {
		name   string
		during func(t *testing.T, user *os.File, guest net.Conn, cancel func())
		want   Result
		err    error
		quits  int
	}{
		{"detach", func(t *testing.T, user *os.File, guest net.Conn, _ func()) {
			if _, err := user.WriteString("ls\r\x03\x01h\x01x\x01x\x01d"); err != nil {
				t.Error(err)
			}
			got := make([]byte, 4)
			if n, err := guest.Read(got); err != nil || string(got[:n]) != "ls\r\x03" {
				t.Errorf("the guest got %q, %v", got, err)
			}
		}, Detached, nil, 2},
		{"ended", func(_ *testing.T, _ *os.File, guest net.Conn, _ func()) { _ = guest.Close() }, Ended, nil, 0},
		{"canceled", func(_ *testing.T, _ *os.File, _ net.Conn, cancel func()) { cancel() }, Detached, context.Canceled, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			user, tty := openTerminal(t)
			before := termios(t, tty)
			console, guest := consolePair(t)
			if _, err := guest.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			var out, notice buffer
			quits := 0
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			raw := make(chan struct{})
			if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: 90, Row: 30}); err != nil {
				t.Fatal(err)
			}
			var columns, rows uint16
			s := Session{Stdin: tty, Stdout: writerFunc(func(p []byte) (int, error) {
				if s := termios(t, tty); s.Lflag&unix.ICANON != 0 {
					t.Error("the terminal is not raw")
				}
				close(raw)
				return out.Write(p)
			}), Notice: &notice, Keys: true, Resize: func(c, r uint16) { columns, rows = c, r }, Stop: func(times int) {
				if times != quits {
					t.Errorf("told %d, want %d", times, quits)
				}
				quits++
			}}
			done := make(chan struct{})
			go func() {
				defer close(done)
				got, err := s.Run(ctx, console)
				if got != test.want || !errors.Is(err, test.err) {
					t.Errorf("%v, %v; want %v, %v", got, err, test.want, test.err)
				}
			}()
			<-raw
			test.during(t, user, guest, cancel)
			<-done
			if after := termios(t, tty); after != before {
				t.Errorf("the terminal was not restored:\n%+v\n%+v", before, after)
			}
			if columns != 90 || rows != 30 {
				t.Errorf("size %dx%d", columns, rows)
			}
			if out.String() != "hello" || quits != test.quits {
				t.Errorf("shown %q, %d quits", out.String(), quits)
			}
			if test.quits > 0 && !strings.Contains(notice.String(), HelpText) {
				t.Errorf("no help in %q", notice.String())
			}
		})
	}
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// TestSessionWithPipe: input that is no terminal is passed as it is, and its
// end does not end the session.
func TestSessionWithPipe(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := w.WriteString("a\x01d"); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	console, guest := consolePair(t)
	var out buffer
	done := make(chan struct{})
	go func() {
		defer close(done)
		if got, err := (Session{Stdin: r, Stdout: &out}).Run(t.Context(), console); got != Ended || err != nil {
			t.Error(got, err)
		}
	}()
	got := make([]byte, 3)
	if n, err := guest.Read(got); err != nil || string(got[:n]) != "a\x01d" {
		t.Errorf("the guest got %q, %v", got, err)
	}
	if _, err := guest.Write([]byte("bye")); err != nil {
		t.Error(err)
	}
	_ = guest.Close()
	<-done
	if out.String() != "bye" {
		t.Errorf("%q", out.String())
	}
}
