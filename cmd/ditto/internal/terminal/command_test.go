package terminal

import (
	"bytes"
	"strings"
	"testing"
)

const boot = "[    0.000000] Linux version 6.12\r\nditto-init: start uptime=0.8 kernel=6.12\r\nditto-init: ready uptime=1.0 modules=9 disks=1 nets=1\r\n"

func TestCommandOutput(t *testing.T) {
	for _, test := range []struct {
		name, console, want string
		status              int
		ended               bool
	}{
		{"lines", boot + "a\r\nb\r\nditto-init: exit status=3 seconds=0.1\r\nditto-init: end action=poweroff\r\nrest\r\n", "a\nb\n", 3, true},
		{"no end of line", boot + "a\r\nbditto-init: exit status=0 seconds=0.1\r\n", "a\nb", 0, true},
		{"nothing", boot + "ditto-init: exit status=127 seconds=0\r\n", "", 127, true},
		{"signal", boot + "ditto-init: exit status=137 signal=9 seconds=1\r\n", "", 137, true},
		{"words of init in between", boot + "a\r\nditto-init: net eth0 up\r\nb\r\nditto-init: exit status=1\r\n", "a\nb\n", 1, true},
		{"never started", "panic\r\n", "", 0, false},
		{"never ended", boot + "a\r\nb", "a\nb", 0, false},
		{"the word inside a line", boot + "see ditto-init: ready\r\nditto-init: exit status=2\r\n", "see ditto-init: ready\n", 2, true},
		{"a bare CR", boot + "10%\r20%\r\n", "10%\r20%\n", 0, false},
		{"long line", boot + "ditto-init: " + strings.Repeat("x", 2*maxLine) + "\r\nb\r\n", "b\n", 0, false},
		{"no number", boot + "ditto-init: exit status=x\r\nb\r\n", "b\n", 0, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			// All at once, and in pieces of every small size.
			for size := range 40 {
				if size == 0 {
					size = len(test.console)
				}
				var out bytes.Buffer
				c := NewCommandOutput(&out, true)
				for rest := []byte(test.console); len(rest) > 0; {
					n := min(size, len(rest))
					if written, err := c.Write(rest[:n]); written != n || err != nil {
						t.Fatal(written, err)
					}
					rest = rest[n:]
				}
				status, ended := c.Status()
				got := out.String()
				if test.name == "long line" {
					got = got[strings.LastIndex(got, "x")+1:]
					got = strings.TrimPrefix(got, "\n")
				}
				if got != test.want || status != test.status || ended != test.ended {
					t.Errorf("pieces of %d: %q, status %d %t; want %q, %d %t", size, got, status, ended, test.want, test.status, test.ended)
				}
			}
		})
	}
}

func TestCommandOutputBefore(t *testing.T) {
	c := NewCommandOutput(nil, false)
	text := strings.Repeat("boot message\n", 1000) + "Kernel panic"
	if _, err := c.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	if got := c.Before(); !strings.HasSuffix(got, "Kernel panic") || len(got) > keepBefore+maxLine {
		t.Errorf("%d bytes: %.30q", len(got), got)
	}
	if _, err := c.Write([]byte("\n" + boot)); err != nil {
		t.Fatal(err)
	}
	if got := c.Before(); got != "" {
		t.Errorf("%q after the start", got)
	}
}

// FuzzCommandOutput: pieces do not matter, and nothing is invented.
func FuzzCommandOutput(f *testing.F) {
	f.Add([]byte(boot+"a\r\nditto-init: exit status=3\r\n"), uint8(3))
	f.Add([]byte(boot+"aditto-init: exit status=3\r\n"), uint8(1))
	f.Add([]byte("ditto-init: \r\n\r\r\n"), uint8(2))
	f.Fuzz(func(t *testing.T, data []byte, size uint8) {
		var whole, pieces bytes.Buffer
		a, b := NewCommandOutput(&whole, false), NewCommandOutput(&pieces, false)
		_, _ = a.Write(data)
		for rest := data; len(rest) > 0; {
			n := min(int(size)+1, len(rest))
			_, _ = b.Write(rest[:n])
			rest = rest[n:]
		}
		sa, ea := a.Status()
		sb, eb := b.Status()
		long := len(data) >= maxLine // lines that long are cut by pieces
		if !long && (sa != sb || ea != eb || !bytes.HasPrefix(whole.Bytes(), pieces.Bytes()) && !bytes.HasPrefix(pieces.Bytes(), whole.Bytes())) {
			t.Errorf("whole %q %d, pieces %q %d", &whole, sa, &pieces, sb)
		}
		if whole.Len() > len(data) {
			t.Error("more came out than went in")
		}
	})
}
