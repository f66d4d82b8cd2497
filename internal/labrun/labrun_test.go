package labrun

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
)

func scanText(t *testing.T, text string, step int) (*Report, string) {
	t.Helper()
	var out bytes.Buffer
	r := &Report{}
	s := &scanner{dst: &out, report: r}
	for len(text) > 0 {
		n := min(step, len(text))
		if _, err := s.Write([]byte(text[:n])); err != nil {
			t.Fatal(err)
		}
		text = text[n:]
	}
	return r, out.String()
}

const verbose = `=== RUN   TestLabA
    a_test.go:3: PROOF boot-200: 0 leaks
--- PASS: TestLabA (0.01s)
    --- SKIP: TestLabA/sub (0.00s)
--- FAIL: TestLabB (0.01s)
some --- PASS: text
`

func TestScanner(t *testing.T) {
	want := &Report{Passed: 1, Failed: 1, Skipped: 1, Skips: []string{"TestLabA/sub"}, Figures: []Figure{{"boot-200", "0 leaks"}}}
	for _, step := range []int{1, 7, len(verbose)} {
		got, out := scanText(t, verbose, step)
		if diff := gocmp.Diff(want, got); diff != "" {
			t.Errorf("in steps of %d (-want +got):\n%s", step, diff)
		}
		if out != verbose {
			t.Errorf("in steps of %d the output was changed", step)
		}
	}
}

func FuzzScanner(f *testing.F) {
	f.Add(verbose, 5)
	f.Add(strings.Repeat("x", 100), 1)
	f.Fuzz(func(t *testing.T, text string, step int) {
		if len(text) > 1<<16 {
			return
		}
		a, out := scanText(t, text, 1+step&0xff)
		if out != text {
			t.Error("the output was changed")
		}
		b, _ := scanText(t, text, len(text)+1)
		if diff := gocmp.Diff(a, b); diff != "" {
			t.Errorf("the report depends on how output arrives:\n%s", diff)
		}
	})
}

func TestCheck(t *testing.T) {
	for name, tc := range map[string]struct {
		r    Report
		code int
		want string // part of the error; "" is none
	}{
		"good":           {Report{Passed: 2}, 0, ""},
		"status":         {Report{Passed: 2}, 2, "exit status 2"},
		"hidden failure": {Report{Passed: 2, Failed: 1}, 0, "failed"},
		"skip":           {Report{Passed: 2, Skipped: 1, Skips: []string{"TestX"}}, 0, "TestX"},
		"nothing":        {Report{}, 0, "no test"},
	} {
		err := tc.r.check(tc.code)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

func TestFuzzRuns(t *testing.T) {
	const out = `fuzz: elapsed: 0s, gathering baseline coverage: 0/9 completed
fuzz: elapsed: 3s, execs: 9131 (3043/sec), new interesting: 1 (total: 10)
fuzz: elapsed: 6s, execs: 18262 (3043/sec), new interesting: 1 (total: 10)
PASS
`
	if got := fuzzRuns(out); got != "18262" {
		t.Errorf("%q runs", got)
	}
	if got := fuzzRuns("PASS\n"); got != "" {
		t.Errorf("%q runs in an output that tells none", got)
	}
}

// TestTargetsExist keeps the lists from rotting without booting anything.
func TestTargetsExist(t *testing.T) {
	t.Chdir("../..")
	listed := map[string]bool{}
	inLab := false
	for _, lp := range LabPackages() {
		if lp.Boots && inLab {
			t.Errorf("%s boots labs while another one runs: list it first", lp.Path)
		}
		inLab = inLab || !lp.Boots
		pkgs, err := listPackages(t.Context(), lp.Path)
		if err != nil || len(pkgs) != 1 {
			t.Fatalf("%s is %d packages with tests, %v; want 1", lp.Path, len(pkgs), err)
		}
		listed[pkgs[0].ImportPath] = true
		run, err := regexp.Compile(cmp.Or(lp.Run, LabRun))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(testNames(t, pkgs[0]), run.MatchString) {
			t.Errorf("%s is listed but has no test that matches %s", lp.Path, run)
		}
	}
	all, err := listPackages(t.Context(), "./...")
	if err != nil {
		t.Fatal(err)
	}
	asks := regexp.MustCompile(`labtest\.Need(Boot)?\(|\brequireLinux\(`)
	for _, p := range all {
		if !listed[p.ImportPath] && len(find(t, p, asks)) > 0 {
			t.Errorf("%s has tests for the lab but is not listed in targets.go: they would never run", p.ImportPath)
		}
	}
	table, err := os.ReadFile(ProofsPath)
	if err != nil && len(Proofs()) > 0 {
		t.Fatal(err)
	}
	for _, p := range Proofs() {
		if p.ID == "" || p.Run == "" || (p.Where != Native && p.Where != InLab) {
			t.Errorf("proof %+v is incomplete", p)
		}
		if !bytes.Contains(table, []byte(p.ID)) {
			t.Errorf("%s has no row for the proof %s", ProofsPath, p.ID)
		}
	}
}

// TestProofsCommands: every command of the table of proofs runs a test, for each of
// the names that it gives. One that finds none passes, and shows nothing.
func TestProofsCommands(t *testing.T) {
	t.Chdir("../..")
	table, err := os.ReadFile(ProofsPath)
	if err != nil {
		t.Fatal(err)
	}
	commands := regexp.MustCompile("`[^`]*-run '?([^' `]+)'? ([^`]*)`").FindAllSubmatch(table, -1)
	if len(commands) < 20 {
		t.Fatalf("%d commands found in %s", len(commands), ProofsPath)
	}
	for _, c := range commands {
		var names []string
		pkgs, err := listPackages(t.Context(), strings.Fields(string(c[2]))...)
		if err != nil {
			t.Fatalf("%s: %v", c[0], err)
		}
		for _, p := range pkgs {
			names = append(names, testNames(t, p)...)
		}
		for name := range strings.SplitSeq(strings.ReplaceAll(string(c[1]), `\|`, "|"), "|") {
			if re := regexp.MustCompile(name); !slices.ContainsFunc(names, re.MatchString) {
				t.Errorf("%s: no test is called %s", c[0], name)
			}
		}
	}
}

// TestProofsFuzz: every fuzz target of the tree has a row in the table of proofs,
// and every row of one is of a target.
func TestProofsFuzz(t *testing.T) {
	t.Chdir("../..")
	table, err := os.ReadFile(ProofsPath)
	if err != nil {
		t.Fatal(err)
	}
	jobs, err := fuzzTargets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var targets, rows []string
	for _, j := range jobs {
		targets = append(targets, j.id)
	}
	for _, m := range regexp.MustCompile("(?m)^\\| (fuzz:\\S+) \\|.*\\| `make prove ARGS=(\\S+)` \\|").FindAllSubmatch(table, -1) {
		if rows = append(rows, string(m[1])); string(m[2]) != string(m[1]) {
			t.Errorf("%s is said to be proven by %s", m[1], m[2])
		}
	}
	slices.Sort(targets)
	slices.Sort(rows)
	if diff := gocmp.Diff(targets, rows); diff != "" {
		t.Errorf("fuzz targets and rows of %s (-targets +rows):\n%s", ProofsPath, diff)
	}
}

// testNames reads the names of a package's tests.
func testNames(t *testing.T, p testPackage) []string {
	t.Helper()
	return find(t, p, regexp.MustCompile(`(?m)^func (Test\w*)\(`))
}

// find returns what matches in a package's test files: the first group, if
// there is one.
func find(t *testing.T, p testPackage, re *regexp.Regexp) []string {
	t.Helper()
	var found []string
	for _, name := range append(p.TestGoFiles, p.XTestGoFiles...) {
		b, err := os.ReadFile(filepath.Join(p.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range re.FindAllSubmatch(b, -1) {
			found = append(found, string(m[len(m)-1]))
		}
	}
	return found
}

func TestSelect(t *testing.T) {
	got := Select([]string{"internal/lab", "./brandnew"})
	want := []LabPackage{{Path: "./internal/lab", Run: BootRun, Boots: true}, {Path: "./brandnew"}}
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("Select (-want +got):\n%s", diff)
	}
}

func TestState(t *testing.T) {
	path := filepath.Join(t.TempDir(), "out", "prove.json")
	if st := loadState(path); st.Passed == nil || len(st.Passed) != 0 {
		t.Errorf("a missing state: %+v", st)
	}
	want := state{Tree: "abc", Passed: map[string]time.Time{"boot-200": time.Unix(1e9, 0).UTC()}}
	if err := want.save(path); err != nil {
		t.Fatal(err)
	}
	if diff := gocmp.Diff(want, loadState(path)); diff != "" {
		t.Errorf("state (-want +got):\n%s", diff)
	}
	if err := os.WriteFile(path, []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if st := loadState(path); st.Tree != "" || st.Passed == nil {
		t.Errorf("a broken state: %+v", st)
	}
}

// TestNativeRun runs a test binary on this machine as the runner would.
func TestNativeRun(t *testing.T) {
	var out bytes.Buffer
	r := &Runner{Out: &out, workDir: t.TempDir()}
	pkgs, err := listPackages(t.Context(), "ditto.vm/internal/proofs")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.open(t.Context(), pkgs); err != nil {
		t.Fatal(err)
	}
	run := func(ctx context.Context, args ...string) (report *Report, err error) {
		done := 0
		j := job{id: "proofs", target: target{pkg: pkgs[0], where: Native, args: args}}
		r.pool(ctx, []job{j}, func(_ job, got *Report, failure error) {
			report, err = got, failure
			done++
		})
		if done > 1 {
			t.Errorf("the job ended %d times", done)
		}
		return report, err
	}
	report, err := run(t.Context(), "-test.run=^TestUpdate")
	if err != nil || report.Passed != 3 {
		t.Errorf("%+v, %v; want 3 passed", report, err)
	}
	if strings.Contains(out.String(), "--- PASS") || !strings.Contains(out.String(), "ok    proofs in ") {
		t.Errorf("what passed printed:\n%s", &out)
	}
	if _, err := run(t.Context(), "-test.run=^TestNone$"); err == nil {
		t.Error("a job without tests passed")
	}
	if !strings.Contains(out.String(), "no tests to run") {
		t.Errorf("what failed printed:\n%s", &out)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if report, err := run(ctx); report != nil && err == nil {
		t.Error("a job passed with a context that had ended")
	}
}

// TestPoolRunsAll: more jobs than workers, all run, some at the same time.
func TestPoolRunsAll(t *testing.T) {
	var out bytes.Buffer
	r := &Runner{Out: &out, Workers: 2, workDir: t.TempDir()}
	pkgs, err := listPackages(t.Context(), "ditto.vm/internal/proofs")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.open(t.Context(), pkgs); err != nil {
		t.Fatal(err)
	}
	jobs, err := r.batchJobs(t.Context(), LabPackage{Boots: true, Run: "^Test"}, pkgs[0])
	if err != nil || len(jobs) < 3 {
		t.Fatalf("%d jobs, %v", len(jobs), err)
	}
	passed := map[string]bool{}
	r.pool(t.Context(), jobs, func(j job, report *Report, err error) {
		if err != nil {
			t.Error(err)
		}
		passed[j.id] = true
	})
	if len(passed) != len(jobs) {
		t.Errorf("%d of %d jobs ran", len(passed), len(jobs))
	}
}

// TestTwice: a few tests that an emulated host lost run again; many do not, nor
// do those of a KVM that runs Linux, and a second failure is one.
func TestTwice(t *testing.T) {
	const script = `#!/bin/sh
n=$(cat $0.runs 2>/dev/null || echo 0)
echo $((n+1)) >$0.runs
[ $n -ge $(cat $0.fails) ] || exit 1
echo "--- PASS: TestX (0.00s)"
`
	for _, tc := range []struct {
		name       string
		native     bool
		jobs       int
		fails      string // the first runs of each job
		ok         bool
		runs       string // of each job
		flakyLines int
	}{
		{"once", false, 2, "1", true, "2", 2},
		{"never", false, 2, "0", true, "1", 0},
		{"both times", false, 1, "2", false, "2", 0},
		{"many", false, maxRepeats + 1, "1", false, "1", 0},
		{"no emulation", true, 1, "1", false, "1", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out bytes.Buffer
			r := &Runner{Out: &out, Native: tc.native, workDir: t.TempDir()}
			var jobs []job
			for i := range tc.jobs {
				path := filepath.Join(t.TempDir(), "test")
				for name, text := range map[string]string{"": script, ".fails": tc.fails} {
					if err := os.WriteFile(path+name, []byte(text), 0o755); err != nil {
						t.Fatal(err)
					}
				}
				jobs = append(jobs, job{id: fmt.Sprint("job", i), target: target{pkg: testPackage{binary: path}, where: Native}})
			}
			if err := r.twice(t.Context(), jobs); (err == nil) != tc.ok {
				t.Errorf("error %v, want ok %v", err, tc.ok)
			}
			for _, j := range jobs {
				if b, err := os.ReadFile(j.target.pkg.binary + ".runs"); err != nil || strings.TrimSpace(string(b)) != tc.runs {
					t.Errorf("%s ran %q times, %v; want %s", j.id, b, err, tc.runs)
				}
			}
			if got := strings.Count(out.String(), "FLAKY "); got != tc.flakyLines {
				t.Errorf("%d lines tell of flaky tests, want %d:\n%s", got, tc.flakyLines, &out)
			}
		})
	}
}

func TestFuzzNames(t *testing.T) {
	dir := t.TempDir()
	text := "package x\nfunc FuzzOne(f *testing.F) {}\n// func FuzzNot(\nfunc FuzzTwo(f *testing.F) {}\nfunc TestFuzz(t *testing.T) {}\n"
	if err := os.WriteFile(filepath.Join(dir, "x_test.go"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := fuzzNames(testPackage{Dir: dir, TestGoFiles: []string{"x_test.go"}})
	if err != nil || !slices.Equal(got, []string{"FuzzOne", "FuzzTwo"}) {
		t.Errorf("fuzzNames = %v, %v", got, err)
	}
}
