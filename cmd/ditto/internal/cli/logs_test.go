package cli

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestSeekLines(t *testing.T) {
	long := strings.Repeat("x", 10_000)
	for _, test := range []struct {
		content string
		n       int
		want    string
	}{
		{"a\nb\nc\n", 2, "b\nc\n"}, {"a\nb\nc", 2, "b\nc"}, {"a\nb\n", 9, "a\nb\n"}, {"a\nb\n", 0, ""},
		{"", 3, ""}, {"\n\n\n", 2, "\n\n"}, {long + "\n" + long + "\nend\n", 2, long + "\nend\n"},
	} {
		path := filepath.Join(t.TempDir(), "log")
		if err := os.WriteFile(path, []byte(test.content), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := seekLines(f, test.n); err != nil {
			t.Error(err)
		}
		got, err := io.ReadAll(f)
		if string(got) != test.want || err != nil {
			t.Errorf("%.20q %d: %.20q, want %.20q, %v", test.content, test.n, got, test.want, err)
		}
		_ = f.Close()
	}
}

// TestMore follows a log that grows and is turned over.
func TestMore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	write := func(s string) {
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("one")
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out strings.Builder
	for _, s := range []string{"one", "onetwo", "3", "3"} {
		write(s)
		if err := more(&out, f); err != nil {
			t.Fatal(err)
		}
	}
	if out.String() != "onetwo3" {
		t.Errorf("%q", out.String())
	}
}

func TestTail(t *testing.T) {
	if got := tail("a\r\nb\r\nc\r\n", 2); got != "b\r\nc" {
		t.Errorf("%q", got)
	}
	if got := tail("", 2); got != "" {
		t.Errorf("%q", got)
	}
}

func TestHuman(t *testing.T) {
	for n, want := range map[uint64]string{0: "0", 512 << 20: "512MiB", 1<<30 + 1: "1.0GiB", 123456789: "117.7MiB", 4096: "4KiB", 1000: "1000"} {
		if got := humanBytes(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
	for ms, want := range map[int64]string{1234: "1.2s", 61_000: "1m1s", 3_660_000: "1h1m", 90_000_000: "1d1h"} {
		if got := humanDuration(time.Duration(ms) * time.Millisecond); got != want {
			t.Errorf("%d: %s, want %s", ms, got, want)
		}
	}
}
