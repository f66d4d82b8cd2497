package bench

import (
	"errors"
	"os"
	"strings"
	"testing"
)

func TestReadSmaps(t *testing.T) {
	text := `00400000-00500000 r-xp 00000000 fd:00 123 /bin/x
Size:               1024 kB
Rss:                 512 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
c000000000-c000400000 rw-p 00000000 00:00 0  [anon: Go: heap]
Rss:                2048 kB
Anonymous:          1024 kB
7f0000000000-7f0018000000 rw-p 00000000 00:00 0
Rss:              393216 kB
Anonymous:        393216 kB
`
	got, err := readSmaps(strings.NewReader(text), 384<<20)
	if want := (footprint{guest: 384 << 20, anonymous: 1 << 20, resident: 2560 << 10}); err != nil || got != want {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	if _, err := readSmaps(strings.NewReader(text), 1<<30); !errors.Is(err, errNoGuestMemory) {
		t.Errorf("without guest memory: %v", err)
	}
	for _, bad := range []string{"zz-1 rw-p\n", "2-1 rw-p\n", "1-3 rw-p\nRss: many kB\n"} {
		if _, err := readSmaps(strings.NewReader(bad), 1); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := readSmaps(f, 1); !errors.Is(err, errNoGuestMemory) {
		t.Errorf("this kernel's format: %v", err)
	}
}

// terse is a line as fio 3.33 writes it, up to the write part.
func terse(errno string) string {
	fields := make([]string, 130)
	for i := range fields {
		fields[i] = "0"
	}
	fields[0], fields[1], fields[2], fields[4] = "3", "fio-3.33", "j", errno
	fields[terseReadKiB], fields[terseReadIOPS] = "204800", "1600"
	fields[terseWriteKiB], fields[terseWriteIOPS] = "4000", "1000"
	return strings.Join(fields, ";")
}

func TestFioValue(t *testing.T) {
	jobs := fioJobs()
	for i, want := range []float64{200, 1600, 1000} {
		got, err := fioValue("fio: a warning\n"+terse("0")+"\n", jobs[i])
		if err != nil || got != want {
			t.Errorf("%s: %v, %v; want %v", jobs[i].metric.Name, got, err, want)
		}
	}
	for _, bad := range []string{"", "3;fio", terse("5"), strings.ReplaceAll(terse("0"), "204800", "0")} {
		if _, err := fioValue(bad, jobs[0]); err == nil {
			t.Errorf("%.40q: no error", bad)
		}
	}
}

func TestIperfValue(t *testing.T) {
	got, err := iperfValue([]byte(`{"start":{},"end":{"sum_sent":{"bits_per_second":9e9},"sum_received":{"bits_per_second":2.5e9}}}`))
	if err != nil || got != 2.5 {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", `{"error":"refused"}`, `{"end":{}}`} {
		if _, err := iperfValue([]byte(bad)); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

func TestUptimeOf(t *testing.T) {
	if got, err := uptimeOf(" uptime=0.812345 kernel=6.12"); err != nil || got != 0.812345 {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "uptime=", "kernel=6"} {
		if _, err := uptimeOf(bad); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}
