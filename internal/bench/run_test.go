package bench

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// fakeSession returns scripted samples and keeps a diary.
type fakeSession struct {
	diary   []string
	fail    string // "NAME ROUND" that fails
	rounds  map[int]int
	closeIt error
}

func (s *fakeSession) Contestants() []Contestant {
	return []Contestant{{"a", "a -x"}, {"b", "b -y"}}
}

func (s *fakeSession) Run(_ context.Context, i int) (Sample, error) {
	name := s.Contestants()[i].Name
	round := s.rounds[i]
	s.rounds[i]++
	s.diary = append(s.diary, fmt.Sprintf("%s%d", name, round))
	if s.fail == fmt.Sprintf("%s %d", name, round) {
		return nil, errors.New("it broke")
	}
	return Sample{"time": float64((round + 1) * (i + 1))}, nil
}

func (s *fakeSession) Close() error {
	s.diary = append(s.diary, "close")
	return s.closeIt
}

func fakeBenchmark(s *fakeSession) *Benchmark {
	s.rounds = map[int]int{}
	return &Benchmark{
		Name: "fake", Where: Native, Rounds: 4, Warmups: 1,
		Metrics:   []Metric{{"time", "s", Lower, "seconds"}},
		Targets:   []Target{{"time", "a", "b", 0.5}, {"time", "a", "", 3}, {"time", "c", "", 3}},
		OpenLimit: time.Minute, RunLimit: time.Minute,
		Open: func(context.Context, *Env) (Session, error) { return s, nil },
	}
}

func silent(string, ...any) {}

func TestRunInterleaves(t *testing.T) {
	s := &fakeSession{}
	r := Run(t.Context(), fakeBenchmark(s), &Env{}, silent)
	if r.Failed != "" || r.Skipped != "" {
		t.Fatalf("failed %q, skipped %q", r.Failed, r.Skipped)
	}
	if diff := cmp.Diff("a0 b0 a1 b1 a2 b2 a3 b3 a4 b4 close", strings.Join(s.diary, " ")); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]float64{2, 3, 4, 5}, r.Entries[0].Values["time"]); diff != "" {
		t.Errorf("the warm-up must not count:\n%s", diff)
	}
	want := []Verdict{
		{Target: Target{"time", "a", "b", 0.5}, Found: &Summary{0.5, 0.5, 0.5, 4}, Met: true},
		{Target: Target{"time", "a", "", 3}, Found: &Summary{3.5, 2, 5, 4}, Met: false},
		{Target: Target{"time", "c", "", 3}},
	}
	if diff := cmp.Diff(want, r.Targets); diff != "" {
		t.Error(diff)
	}
}

func TestRunQuick(t *testing.T) {
	if r := Run(t.Context(), fakeBenchmark(&fakeSession{}), &Env{Quick: true, Rounds: 1}, silent); r.Rounds != 1 {
		t.Errorf("%d rounds of at most 1", r.Rounds)
	}
	s := &fakeSession{}
	if r := Run(t.Context(), fakeBenchmark(s), &Env{Quick: true}, silent); r.Rounds != quickRounds || !r.Quick {
		t.Errorf("%d rounds, quick %v", r.Rounds, r.Quick)
	}
}

// A round that fails half way must not leave values that belong to no pair.
func TestRunFailure(t *testing.T) {
	s := &fakeSession{fail: "b 2", closeIt: errors.New("close broke")}
	r := Run(t.Context(), fakeBenchmark(s), &Env{}, silent)
	if !strings.Contains(r.Failed, "b: it broke") || !strings.Contains(r.Failed, "close broke") {
		t.Errorf("failed: %q", r.Failed)
	}
	if r.Rounds != 1 || len(r.Entries[0].Values["time"]) != 1 || len(r.Entries[1].Values["time"]) != 1 {
		t.Errorf("%d rounds, values %v and %v", r.Rounds, r.Entries[0].Values, r.Entries[1].Values)
	}
	if s.diary[len(s.diary)-1] != "close" {
		t.Errorf("not closed: %v", s.diary)
	}
}

// In an emulated host a round may be lost, and the session begins anew.
func TestRunRepeatsLostRound(t *testing.T) {
	s := &fakeSession{fail: "b 2"}
	b := fakeBenchmark(s)
	b.Where = Lab
	r := Run(t.Context(), b, &Env{}, silent)
	if r.Failed != "" || r.Lost != 1 || r.Rounds != 4 || len(r.Entries[1].Values["time"]) != 4 {
		t.Errorf("failed %q, %d lost, %d rounds, values %v", r.Failed, r.Lost, r.Rounds, r.Entries[1].Values)
	}
	if diff := cmp.Diff("a0 b0 a1 b1 a2 b2 close a3 b3 a4 b4 a5 b5 close", strings.Join(s.diary, " ")); diff != "" {
		t.Error(diff)
	}
}

func TestRunUnavailable(t *testing.T) {
	b := fakeBenchmark(&fakeSession{})
	env := &Env{Missing: map[string]string{"QEMU": "not installed"}}
	b.Open = func(_ context.Context, env *Env) (Session, error) {
		return nil, env.need("Ditto", "x", "QEMU", env.QEMU)
	}
	if r := Run(t.Context(), b, env, silent); r.Skipped != "QEMU: not installed" || r.Failed != "" {
		t.Errorf("skipped %q, failed %q", r.Skipped, r.Failed)
	}
}

func TestRunLimit(t *testing.T) {
	b := fakeBenchmark(&fakeSession{})
	b.OpenLimit = time.Nanosecond
	b.Open = func(ctx context.Context, _ *Env) (Session, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if r := Run(t.Context(), b, &Env{}, silent); !strings.Contains(r.Failed, "not done within 1ns") {
		t.Errorf("failed: %q", r.Failed)
	}
}

func TestSelect(t *testing.T) {
	all := All()
	for _, test := range []struct {
		pattern string
		want    int
		ok      bool
	}{{"", len(all), true}, {"^disk-", 2, true}, {"boot-linux", 1, true}, {"nothing", 0, false}, {"(", 0, false}} {
		got, err := Select(all, test.pattern)
		if len(got) != test.want || (err == nil) != test.ok {
			t.Errorf("Select(%q): %d benchmarks, %v", test.pattern, len(got), err)
		}
	}
}

// Every target must name a metric of its benchmark, and names must be unique:
// a report is merged by them.
func TestSuiteIsConsistent(t *testing.T) {
	seen := map[string]bool{}
	for _, b := range All() {
		if seen[b.Name] {
			t.Errorf("%s stands twice", b.Name)
		}
		seen[b.Name] = true
		for _, target := range b.Targets {
			if _, err := b.metric(target.Metric); err != nil {
				t.Error(err)
			}
		}
		rounds, warmups := 5, 1
		if b.RunLimit >= 10*time.Minute { // a run of many parts, each with programs of its own
			rounds, warmups = 3, 0
		}
		if b.Rounds < rounds || b.Warmups < warmups || b.OpenLimit == 0 || b.RunLimit == 0 || b.Open == nil {
			t.Errorf("%s: %d rounds, %d warm-ups, limits %s and %s", b.Name, b.Rounds, b.Warmups, b.OpenLimit, b.RunLimit)
		}
	}
}
