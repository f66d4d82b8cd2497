package bench

import (
	"os"
	"testing"
	"time"
)

func TestReadReport(t *testing.T) {
	const events = `{"event":"progress","phase":"copy"}
{"event":"migrated","name":"a","total_ns":2000000000,"downtime_ns":30000000,"sent":{"total":1234,"raw":1000}}
`
	var m moved
	if err := m.readReport([]byte(events)); err != nil || m != (moved{total: 2 * time.Second, downtime: 30 * time.Millisecond, sent: 1234}) {
		t.Errorf("%+v, %v", m, err)
	}
	for _, bad := range []string{"", "x", `{"event":"failed","error":"no"}`, `{"event":"migrated"}`} {
		if err := m.readReport([]byte(bad)); err == nil {
			t.Errorf("%q is a report", bad)
		}
	}
}

func TestCPUTime(t *testing.T) {
	before, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for n, after := 0, before; after == before; n++ {
		if after, err = cpuTime(os.Getpid()); err != nil {
			t.Fatal(err)
		}
		if n > 1<<24 {
			t.Fatal("work takes no time")
		}
	}
	if _, err := cpuTime(1 << 30); err == nil {
		t.Error("a process that cannot be has used time")
	}
}
