package bench

import (
	"context"
	"fmt"
	"regexp"
	"time"
)

// Where is the kind of host a benchmark needs.
type Where string

// The kinds of host.
const (
	// Native is the machine itself, whatever its KVM can do.
	Native Where = "native"
	// Lab is a host whose KVM runs unmodified Linux kernels: the machine
	// itself if it can, an emulated one otherwise.
	Lab Where = "lab"
)

// Direction says which values of a metric are the better ones.
type Direction string

// The directions.
const (
	Lower  Direction = "lower"
	Higher Direction = "higher"
)

// Metric is one thing that a run measures.
type Metric struct {
	Name   string    `json:"name"`
	Unit   string    `json:"unit"` // s, ms, MiB, MiB/s, IOPS, Gbit/s
	Better Direction `json:"better"`
	What   string    `json:"what"` // one line for the reader
}

// Target is a promise about one metric of one contestant: its median, or the
// median of its ratio to another contestant, stays within a limit. Whether the
// limit is an upper or a lower one follows from the metric's direction.
type Target struct {
	Metric     string  `json:"metric"`
	Contestant string  `json:"contestant"`
	Against    string  `json:"against,omitempty"` // empty: the value itself
	Limit      float64 `json:"limit"`
}

// Contestant is one way of doing a benchmark's work.
type Contestant struct {
	Name string `json:"name"`
	// Command is how it was started, for the reader.
	Command string `json:"command"`
}

// Sample is what one run measured, by metric.
type Sample map[string]float64

// Session does a benchmark's work for one contestant at a time.
type Session interface {
	// Contestants returns who takes part, in the order of a round.
	Contestants() []Contestant
	// Run does the work once with the contestant of that index.
	Run(ctx context.Context, contestant int) (Sample, error)
	// Close ends and joins whatever the session started.
	Close() error
}

// Benchmark is one question that contestants answer by doing the same work.
type Benchmark struct {
	Name  string
	Title string
	Where Where
	// LabCPUs is how many CPUs the emulated host has. One is safe and fair, since
	// with several a kernel that patches its own code dies now and then (see
	// internal/lab). Zero means as many as this host, for what needs a VMM's
	// threads to run beside the guest.
	LabCPUs int
	// NeedsDisk says that Env.RootDisk is used.
	NeedsDisk bool
	Rounds    int // that count
	Warmups   int // rounds before them, discarded
	Metrics   []Metric
	Targets   []Target
	// Figure draws what was found, nil for nothing.
	Figure func(*Result) *Figure
	// OpenLimit and RunLimit bound Open and one Run.
	OpenLimit, RunLimit time.Duration
	// Open prepares for the runs. When it fails it leaves nothing behind.
	Open func(context.Context, *Env) (Session, error)
}

// metric returns the metric of that name.
func (b *Benchmark) metric(name string) (Metric, error) {
	for _, m := range b.Metrics {
		if m.Name == name {
			return m, nil
		}
	}
	return Metric{}, fmt.Errorf("benchmark %s: no metric %q", b.Name, name)
}

// Select returns the benchmarks whose name pattern matches, or all of them for
// an empty pattern.
func Select(all []Benchmark, pattern string) ([]Benchmark, error) {
	re, err := regexp.Compile(pattern)
	if err != nil {
		return nil, fmt.Errorf("pattern %q: %w", pattern, err)
	}
	var chosen []Benchmark
	for _, b := range all {
		if re.MatchString(b.Name) {
			chosen = append(chosen, b)
		}
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("no benchmark matches %q", pattern)
	}
	return chosen, nil
}
