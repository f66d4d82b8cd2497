package main

import (
	"bytes"
	"os"
	"strings"
	"testing"
	"time"
)

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{"1": 1, "512M": 512 << 20, "64G": 64 << 30, "2T": 2 << 40, "3K": 3 << 10} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "G", "-1G", "0", "1.5G", "9999999T", "64g", "64GB"} {
		if got, err := parseSize(s); err == nil {
			t.Errorf("parseSize(%q) = %d, want an error", s, got)
		}
	}
}

func TestCommandLine(t *testing.T) {
	var f *flags
	var argv []string
	cmd := newCommand(func(got *flags, rest []string) error {
		f, argv = got, rest
		return nil
	})
	cmd.AddCommand(newTestCommand(&bytes.Buffer{}, &bytes.Buffer{}))
	for line, want := range map[string]string{
		"":                             "sh",
		"-- test -f /x":                "test -f /x",
		"-t 5m -- ls -la":              "ls -la",
		"-m 2048 -c 3 ls -la --memory": "ls -la --memory",
	} {
		cmd.SetArgs(strings.Fields(line))
		if err := cmd.Execute(); err != nil || strings.Join(argv, " ") != want {
			t.Errorf("%q runs %q, %v; want %q", line, argv, err, want)
		}
	}
	if f.opts.MemoryMiB != 2048 || f.opts.CPUs != 3 || f.timeout != 5*time.Minute {
		t.Errorf("flags: %+v", f)
	}
}

func TestBadCommandLine(t *testing.T) {
	stdin, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stdin.Close() }()
	for name, args := range map[string][]string{
		"unknown flag": {"--nonsense", "--", "true"},
		"bad size":     {"--disk", "much", "--", "true"},
		"bad memory":   {"--memory", "1", "--", "true"},
		"bad kernel":   {"--kernel", "nonsense", "--", "true"},
	} {
		var out, errs bytes.Buffer
		code := run(args, stdin, &out, &errs)
		if code != exitFailed || strings.Count(errs.String(), "\n") != 1 || !strings.HasPrefix(errs.String(), "ditto-lab: ") {
			t.Errorf("%s: %d, %q; want %d and one line", name, code, errs.String(), exitFailed)
		}
	}
}

func TestProgressNamesStepsOnce(t *testing.T) {
	var out bytes.Buffer
	p := &textProgress{w: &out}
	for _, f := range []float64{0, 0.5, 1} {
		p.Report("fetch", f)
	}
	p.Report("unpack", 0)
	p.Report("nothing to do", 1)
	if want := "ditto-lab: fetch\nditto-lab: unpack\n"; out.String() != want {
		t.Errorf("progress:\n%swant:\n%s", out.String(), want)
	}
}
