package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"
)

const (
	// curveMemoryMiB is the memory of the guest whose downtime is looked at.
	curveMemoryMiB = 512
	mib            = 1 << 20
)

// curveLinks are the speeds of the network between the hosts, in Mbit/s, and the
// rates at which the guest writes, in MiB/s, from almost nothing to more than the
// slower network carries.
func curveLinks() []int { return []int{500, 2000} }

func curveRates() []int { return []int{1, 20, 40, 80, 160} }

// migrateCurve: downtime against dirty rate and bandwidth.
func migrateCurve() Benchmark {
	b := Benchmark{
		Name: "migrate-curve",
		Title: fmt.Sprintf("Moving a payload of %d MiB that writes pages at random, between two network namespaces: downtime (300 ms allowed) and total time by the rate of writes and the speed of the network",
			curveMemoryMiB),
		Where: Native, Rounds: 3,
		OpenLimit: 10 * time.Minute, RunLimit: 20 * time.Minute,
		Open: openCurve, Figure: curveFigure,
	}
	for _, link := range curveLinks() {
		for _, rate := range curveRates() {
			name := curvePoint(link, rate)
			b.Metrics = append(b.Metrics,
				Metric{"downtime-" + name, "ms", Lower, fmt.Sprintf("%d Mbit/s, the guest writes %d MiB/s", link, rate)},
				Metric{"total-" + name, "s", Lower, "likewise, the whole migration"})
		}
	}
	return b
}

func curvePoint(link, rate int) string { return strconv.Itoa(link) + "M-" + strconv.Itoa(rate) }

// curve is a session that moves a payload at each rate of writes over each network.
type curve struct {
	dir  string
	pair *netPair
	env  *Env
}

func openCurve(ctx context.Context, env *Env) (_ Session, err error) {
	s := &curve{env: env}
	if s.pair, err = openNetPair(ctx); err != nil {
		return nil, err
	}
	if s.dir, err = payloadFolder(env); err != nil {
		return nil, errors.Join(err, s.pair.close())
	}
	return s, nil
}

// carriers are those of a point.
func (s *curve) carriers(rate int) ([]carrier, error) {
	h := how{places: s.pair.places, connections: moveConnections, throttle: true}
	return payloadCarriers(s.env, s.dir, h, curveMemoryMiB, uint64(rate)*mib/4096)
}

// Contestants implements [Session].
func (s *curve) Contestants() []Contestant {
	list := []Contestant{{nameDitto, ""}, {nameQEMU, ""}}
	if carriers, err := s.carriers(curveRates()[0]); err == nil {
		for i := range list {
			list[i].Command = shellLine(carriers[i].command())
		}
	}
	return list
}

// Run implements [Session].
func (s *curve) Run(ctx context.Context, i int) (Sample, error) {
	sample := Sample{}
	for _, link := range curveLinks() {
		if err := s.pair.shape(ctx, link); err != nil {
			return nil, err
		}
		for n, rate := range curveRates() {
			if s.env.Quick && n%2 == 1 {
				continue // every other point
			}
			carriers, err := s.carriers(rate)
			if err != nil {
				return nil, err
			}
			m, err := movePayload(ctx, carriers[i], false)
			if err != nil {
				return nil, fmt.Errorf("%d Mbit/s, %d MiB/s: %w", link, rate, err)
			}
			name := curvePoint(link, rate)
			sample["downtime-"+name], sample["total-"+name] = milliseconds(m.downtime), m.total.Seconds()
		}
	}
	return sample, nil
}

// Close implements [Session].
func (s *curve) Close() error { return errors.Join(s.pair.close(), os.RemoveAll(s.dir)) }

// curveFigure draws both.
func curveFigure(r *Result) *Figure {
	f := &Figure{Title: "Migration of a guest that writes: ditto and QEMU", Panels: []Panel{
		{X: "the guest writes, MiB/s", Y: "downtime, ms"},
		{X: "the guest writes, MiB/s", Y: "total time, s"},
	}}
	for i, metric := range []string{"downtime-", "total-"} {
		for style, e := range r.Entries {
			for shade, link := range curveLinks() {
				line := Series{Name: fmt.Sprintf("%s, %d Mbit/s", e.Name, link), Style: style, Shade: shade}
				for _, rate := range curveRates() {
					if s, ok := e.Summary[metric+curvePoint(link, rate)]; ok && s.N > 0 {
						line.Points = append(line.Points, Point{float64(rate), s.Median, s.Min, s.Max})
					}
				}
				f.Panels[i].Series = append(f.Panels[i].Series, line)
			}
		}
	}
	return f
}
