package bench

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func sampleReport(t *testing.T) Report {
	t.Helper()
	good := Run(t.Context(), fakeBenchmark(&fakeSession{}), &Env{Commit: "abc", Host: Host{CPU: "Z80", Cores: 1}}, silent)
	good.Started, good.Took = time.Date(2026, 11, 22, 15, 0, 0, 0, time.UTC), time.Minute
	good.Entries[0].Command = "ditto run --kernel /a/b/vmlinuz"
	return Report{Version: reportVersion, Results: []Result{good, {Name: "other", Title: "Other", Skipped: "no\nQEMU"}}}
}

func TestTables(t *testing.T) {
	got := Tables(sampleReport(t))
	for _, want := range []string{
		"| fake | time of a <= 0.50 x b | 0.500 x (0.500 to 0.500) | met |\n",
		"| fake | time of a <= 3.00 s | 3.50 (2.00 to 5.00) s | **missed** |\n",
		"| fake | time of c <= 3.00 s |  | not measured |\n",
		"| time, s | 3.50 (2.00 to 5.00) | 7.00 (4.00 to 10.0) | 0.500 |\n",
		"Measured 2026-11-22 15:00 UTC, commit abc",
		"a             ditto run --kernel vmlinuz\n",
		"**Not run.** no QEMU\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing in\n%s", want, got)
		}
	}
}

func TestUpdateDocument(t *testing.T) {
	path := filepath.Join(t.TempDir(), "doc.md")
	text := "# Before\n\n" + MarkerBegin + "\nold\n" + MarkerEnd + "\n\nAfter\n"
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	report := sampleReport(t)
	var versions []string
	for range 2 {
		if err := UpdateDocument(path, report); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		versions = append(versions, string(got))
	}
	if diff := cmp.Diff(versions[0], versions[1]); diff != "" {
		t.Errorf("the second time changed it:\n%s", diff)
	}
	if got := versions[0]; !strings.HasPrefix(got, "# Before\n") || !strings.HasSuffix(got, "\n\nAfter\n") || strings.Contains(got, "old") {
		t.Errorf("got\n%s", got)
	}
	for _, bad := range []string{"", MarkerBegin, MarkerEnd + MarkerBegin, text + text} {
		if _, err := replaceTables(bad, Report{}); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

// TestUpdateDocumentKeeps measures one of two benchmarks again, without the
// report of the first time.
func TestUpdateDocumentKeeps(t *testing.T) {
	empty := MarkerBegin + "\n" + MarkerEnd
	both := sampleReport(t)
	first, err := replaceTables(empty, both)
	if err != nil {
		t.Fatal(err)
	}
	same, err := replaceTables(first, Report{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(first, same); diff != "" {
		t.Errorf("nothing was measured, and this changed:\n%s", diff)
	}
	other := Report{Results: []Result{{Name: "other", Title: "Other", Skipped: "no disk"}}}
	again, err := replaceTables(first, other)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.ReplaceAll(first, "no QEMU", "no disk"), again); diff != "" {
		t.Error(diff)
	}
}

func TestReportMerges(t *testing.T) {
	path := filepath.Join(t.TempDir(), "deep", "bench.json")
	r, err := LoadReport(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, result := range []Result{{Name: "a", Rounds: 1}, {Name: "b", Rounds: 1}, {Name: "a", Rounds: 2}} {
		r.Put(result)
	}
	if err := r.Save(path); err != nil {
		t.Fatal(err)
	}
	again, err := LoadReport(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(r, again); diff != "" {
		t.Error(diff)
	}
	if len(again.Results) != 2 || again.Result("a").Rounds != 2 || again.Result("c") != nil {
		t.Errorf("results %+v", again.Results)
	}
	for _, bad := range []string{"{", `{"version": 99}`} {
		if err := os.WriteFile(path, []byte(bad), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadReport(path); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

func TestReadEvents(t *testing.T) {
	r, w := io.Pipe()
	go func() {
		_, _ = io.WriteString(w, `{"progress":"one"}`+"\n\n"+`{"result":{"name":"x"}}`+"\nrubbish\n"+`{"progress":"two"}`)
		_ = w.Close()
	}()
	var heard []string
	err := readEvents(r, func(_ string, args ...any) { heard = append(heard, args[0].(string)) },
		func(r Result) { heard = append(heard, "result "+r.Name) })
	if diff := cmp.Diff("one, result x, two", strings.Join(heard, ", ")); diff != "" {
		t.Error(diff)
	}
	if err == nil || !strings.Contains(err.Error(), "rubbish") {
		t.Errorf("error %v, want one about the rubbish", err)
	}
}

func TestKVMKind(t *testing.T) {
	dir := t.TempDir()
	if got := kvmKind(dir); got != "unknown" {
		t.Errorf("got %q", got)
	}
	if err := os.MkdirAll(filepath.Join(dir, "kvm_amd", "parameters"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "kvm_amd", "parameters", "npt"), []byte("Y\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := kvmKind(dir); got != "kvm_amd, npt=Y" {
		t.Errorf("got %q", got)
	}
}

func TestShellLine(t *testing.T) {
	got := shellLine([]string{"/usr/bin/x", "-a", "b c", "", "it's"})
	if want := `x -a 'b c' '' 'it'\''s'`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
