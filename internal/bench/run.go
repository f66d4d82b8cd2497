package bench

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Unavailable is the error of an Open that finds something missing which the
// benchmark cannot do without. The message says what, and how to get it.
type Unavailable struct{ Reason string }

func (e *Unavailable) Error() string { return e.Reason }

// Progress hears what is being done, one short line at a time.
type Progress func(format string, args ...any)

// Run runs one benchmark. It always returns a Result: one that could not run,
// or not to its end, says why in it.
func Run(ctx context.Context, b *Benchmark, env *Env, progress Progress) Result {
	r := Result{
		Name: b.Name, Title: b.Title, Where: b.Where, Started: time.Now().UTC().Truncate(time.Second),
		Commit: env.Commit, Host: env.Host, Quick: env.Quick, Metrics: b.Metrics,
	}
	err := r.run(ctx, b, env, progress)
	var missing *Unavailable
	switch {
	case errors.As(err, &missing):
		r.Skipped = missing.Reason
	case err != nil:
		r.Failed = err.Error()
	}
	r.Took = time.Since(r.Started)
	if err := r.conclude(b); err != nil && r.Failed == "" {
		r.Failed = err.Error()
	}
	return r
}

func (r *Result) run(ctx context.Context, b *Benchmark, env *Env, progress Progress) (err error) {
	rounds, warmups := b.Rounds, b.Warmups
	if env.Quick {
		rounds, warmups = min(rounds, quickRounds), min(warmups, 1)
	}
	if env.Rounds > 0 {
		rounds = min(rounds, env.Rounds)
	}
	open := func() (Session, error) {
		progress("%s: preparing", b.Name)
		return limited(ctx, b.OpenLimit, func(ctx context.Context) (Session, error) { return b.Open(ctx, env) })
	}
	session, err := open()
	if err != nil {
		return err
	}
	defer func() {
		if session != nil {
			err = errors.Join(err, session.Close())
		}
	}()
	for _, c := range session.Contestants() {
		r.Entries = append(r.Entries, Entry{Contestant: c, Values: map[string][]float64{}})
	}
	for round := 0; round < warmups+rounds; {
		samples, err := runRound(ctx, b, session, r.Entries, func(name string, s Sample) {
			progress("%s %s: %s %s", b.Name, roundName(round, warmups, rounds), name, s.text(b.Metrics))
		})
		if err != nil {
			if b.Where != Lab || r.Lost == mostLost || ctx.Err() != nil {
				return err
			}
			r.Lost++
			progress("%s: a round is lost: %v", b.Name, err)
			err = session.Close()
			session = nil
			if err != nil {
				return err
			}
			if session, err = open(); err != nil {
				return err
			}
			continue
		}
		if round++; round > warmups {
			r.count(b, samples)
		}
	}
	return nil
}

// mostLost is how many rounds of a benchmark in an emulated host may be lost to
// a guest that died (see internal/lab): its session is opened anew.
const mostLost = 3

// count adds a round.
func (r *Result) count(b *Benchmark, samples []Sample) {
	for i, sample := range samples {
		for _, m := range b.Metrics {
			if value, ok := sample[m.Name]; ok {
				r.Entries[i].Values[m.Name] = append(r.Entries[i].Values[m.Name], value)
			}
		}
	}
	r.Rounds++
}

// quickRounds is how many rounds of a benchmark count with Env.Quick.
const quickRounds = 3

// runRound lets every contestant do the work once. A round counts only as a
// whole, so that values with one index belong together.
func runRound(ctx context.Context, b *Benchmark, session Session, entries []Entry, done func(string, Sample)) ([]Sample, error) {
	samples := make([]Sample, len(entries))
	for i := range entries {
		var err error
		samples[i], err = limited(ctx, b.RunLimit, func(ctx context.Context) (Sample, error) { return session.Run(ctx, i) })
		if err != nil {
			return nil, fmt.Errorf("%s: %w", entries[i].Name, err)
		}
		done(entries[i].Name, samples[i])
	}
	return samples, nil
}

// limited calls f with a context that ends after limit.
func limited[T any](ctx context.Context, limit time.Duration, f func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done within %s", limit))
	defer cancel()
	value, err := f(ctx)
	if err != nil && ctx.Err() != nil && !errors.Is(err, context.Cause(ctx)) {
		err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return value, err
}

func roundName(round, warmups, rounds int) string {
	if round < warmups {
		return "warm-up"
	}
	return fmt.Sprintf("%d/%d", round-warmups+1, rounds)
}

// text lists a sample's values in the order of the metrics.
func (s Sample) text(metrics []Metric) string {
	out := ""
	for _, m := range metrics {
		if v, ok := s[m.Name]; ok {
			out += fmt.Sprintf(" %s=%s", m.Name, formatValue(v, m.Unit))
		}
	}
	return out
}
