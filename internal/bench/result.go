package bench

import (
	"fmt"
	"strings"
	"time"
)

// Result is what one benchmark found.
type Result struct {
	Name    string        `json:"name"`
	Title   string        `json:"title"`
	Where   Where         `json:"where"`
	Started time.Time     `json:"started"`
	Took    time.Duration `json:"took_ns"`
	Commit  string        `json:"commit"`
	Host    Host          `json:"host"`
	Quick   bool          `json:"quick,omitempty"`
	Rounds  int           `json:"rounds"`
	Lost    int           `json:"lost_rounds,omitempty"` // repeated, because a guest died in the emulated host
	Metrics []Metric      `json:"metrics"`
	Entries []Entry       `json:"contestants"`
	Targets []Verdict     `json:"targets"`
	Figure  *Figure       `json:"figure,omitempty"`
	// Skipped says why the benchmark could not run at all.
	Skipped string `json:"skipped,omitempty"`
	// Failed says what ended the benchmark early.
	Failed string `json:"failed,omitempty"`
}

// Entry is the values of one contestant. Values[metric][i] is of round i.
type Entry struct {
	Contestant
	Values  map[string][]float64 `json:"values"`
	Summary map[string]Summary   `json:"summary"`
}

// Verdict says where a target stands.
type Verdict struct {
	Target
	// Found is the median of the value or of the ratio; nil if it was not
	// measured.
	Found *Summary `json:"found,omitempty"`
	Met   bool     `json:"met"`
}

// entry returns the values of a contestant.
func (r *Result) entry(name string) *Entry {
	for i := range r.Entries {
		if r.Entries[i].Name == name {
			return &r.Entries[i]
		}
	}
	return nil
}

// conclude computes the summaries and the verdicts from the values.
func (r *Result) conclude(b *Benchmark) error {
	for i := range r.Entries {
		e := &r.Entries[i]
		e.Summary = map[string]Summary{}
		for name, values := range e.Values {
			e.Summary[name] = Summarize(values)
		}
	}
	if b.Figure != nil && r.Rounds > 0 {
		r.Figure = b.Figure(r)
	}
	r.Targets = nil
	for _, target := range b.Targets {
		metric, err := b.metric(target.Metric)
		if err != nil {
			return err
		}
		v := Verdict{Target: target}
		if found, ok := r.measure(target); ok {
			v.Found = &found
			v.Met = within(found.Median, target.Limit, metric.Better)
		}
		r.Targets = append(r.Targets, v)
	}
	return nil
}

// measure returns the value or ratio that a target is about.
func (r *Result) measure(t Target) (Summary, bool) {
	of := r.entry(t.Contestant)
	if of == nil {
		return Summary{}, false
	}
	values := of.Values[t.Metric]
	if t.Against != "" {
		other := r.entry(t.Against)
		if other == nil {
			return Summary{}, false
		}
		values = Ratios(values, other.Values[t.Metric])
	}
	return Summarize(values), len(values) > 0
}

func within(value, limit float64, better Direction) bool {
	if better == Higher {
		return value >= limit
	}
	return value <= limit
}

// Verdicts tells in a line each where the targets stand.
func (r *Result) Verdicts() []string {
	var lines []string
	for _, v := range r.Targets {
		what, found, verdict := r.describe(v)
		lines = append(lines, strings.TrimSpace(fmt.Sprintf("%s: %s: %s %s", r.Name, what, found, verdict)))
	}
	return lines
}

// describe tells a target, what was found and whether it was met.
func (r *Result) describe(v Verdict) (what, found, verdict string) {
	metric := r.metric(v.Metric)
	sign := "<="
	if metric.Better == Higher {
		sign = ">="
	}
	what = fmt.Sprintf("%s of %s %s %s", v.Metric, v.Contestant, sign, formatValue(v.Limit, metric.Unit))
	if v.Against != "" {
		what = fmt.Sprintf("%s of %s %s %.2f x %s", v.Metric, v.Contestant, sign, v.Limit, v.Against)
	}
	switch {
	case v.Found == nil:
		return what, "", "not measured"
	case v.Against != "":
		found = fmt.Sprintf("%.3f x (%.3f to %.3f)", v.Found.Median, v.Found.Min, v.Found.Max)
	default:
		found = formatSummary(*v.Found) + " " + metric.Unit
	}
	if v.Met {
		return what, found, "met"
	}
	return what, found, "missed"
}

// metric returns the metric of that name, or an empty one.
func (r *Result) metric(name string) Metric {
	for _, m := range r.Metrics {
		if m.Name == name {
			return m
		}
	}
	return Metric{}
}
