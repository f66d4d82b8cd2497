package namestest_test

import (
	"os"
	"strings"
	"testing"

	"ditto.vm/devices/virtio/blk"
	"ditto.vm/images/disk"
	"ditto.vm/internal/labtest"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// A rule of names, the schedule in which it matters, and the same parts without
// it. docs/names.md lists them.
type rule struct {
	name, rule string
	play       func(*stage)
	broken     func() mutant
	// raced says that the race finds it as well, within a few rounds.
	raced bool
}

// observed breaks the disk's observer.
func observed(wrap func(blk.Observer) blk.Observer) func() mutant {
	return func() mutant { return mutant{observer: wrap} }
}

var rules = []rule{
	{
		name: "read-from-its-begin", rule: "a read is noted when it begins: what happens to its page and blocks until it ends forbids a name",
		play: func(s *stage) {
			slow := s.begin(0, read(block0, pageP))
			slow.move()
			s.do(write(block0, pageQ))
			slow.end()
		},
		broken: observed(func(o blk.Observer) blk.Observer { return quietRead{o} }), raced: true,
	},
	{
		name: "reads-of-one-page", rule: "of two reads into one page at once neither names it",
		play: func(s *stage) {
			first, second := s.begin(0, read(block0, pageP)), s.begin(1, read(block1, pageP))
			first.move()
			second.move()
			second.end()
			first.end()
		},
		broken: observed(func(o blk.Observer) blk.Observer { return quietRead{o} }), raced: true,
	},
	{
		name: "write-drops-names", rule: "a write drops the names of its blocks before it begins",
		play: func(s *stage) {
			s.do(read(block0, pageP))
			s.prove(pageP)
			s.do(write(block0, pageQ))
		},
		broken: observed(func(o blk.Observer) blk.Observer { return noBeforeWrite{o} }), raced: true,
	},
	{
		name: "write-from-its-begin", rule: "of two writes to one block at once neither names a page",
		play: func(s *stage) {
			first, second := s.begin(0, write(block0, pageP)), s.begin(1, write(block0, pageQ))
			second.move()
			first.move()
			first.end()
			second.end()
		},
		broken: observed(func(o blk.Observer) blk.Observer { return quietWrite{o} }), raced: true,
	},
	{
		name: "write-until-its-end", rule: "until a write is over its blocks name nothing",
		play: func(s *stage) {
			slow := s.begin(0, write(block0, pageP))
			s.do(read(block0, pageQ))
			slow.move()
			slow.end()
		},
		broken: observed(func(o blk.Observer) blk.Observer { return hastyWrite{o} }), raced: true,
	},
	{
		name: "zeroes-drop-names", rule: "write-zeroes drops the names of its blocks",
		play: func(s *stage) {
			s.do(read(block0, pageP))
			s.prove(pageP)
			s.do(zero(block0))
		},
		broken: observed(func(o blk.Observer) blk.Observer { return noErase{o} }), raced: true,
	},
	{
		name: "discard-drops-names", rule: "a discard drops the names of its blocks",
		play: func(s *stage) {
			s.do(read(block0, pageP))
			s.prove(pageP)
			s.do(discard(block0))
		},
		broken: observed(func(o blk.Observer) blk.Observer { return noErase{o} }), raced: true,
	},
	{
		name: "erase-until-its-end", rule: "until blocks are erased they name nothing",
		play: func(s *stage) {
			slow := s.begin(0, zero(block0))
			s.do(read(block0, pageP))
			slow.move()
			slow.end()
		},
		broken: observed(func(o blk.Observer) blk.Observer { return hastyErase{o} }), raced: true,
	},
	{
		name: "resize-drops-names", rule: "a disk that is cut short loses the names beyond its end",
		play: func(s *stage) {
			s.do(read(lastBlock, pageP))
			s.prove(pageP)
			s.resize(lastBlock - 1)
			s.resize(diskBlocks)
		},
		broken: observed(func(o blk.Observer) blk.Observer { return noResize{o} }), raced: true,
	},
	{
		name: "failed-read", rule: "a read that failed names nothing",
		play:   func(s *stage) { s.begin(0, read(block0, pageP)).fail() },
		broken: observed(func(o blk.Observer) blk.Observer { return allDone{o} }), raced: true,
	},
	{
		name: "failed-write", rule: "a write that failed names nothing",
		play:   func(s *stage) { s.begin(0, write(block0, pageP)).fail() },
		broken: observed(func(o blk.Observer) blk.Observer { return allDone{o} }), raced: true,
	},
	{
		name: "whole-pages", rule: "only whole pages that are whole blocks get names",
		play: func(s *stage) {
			s.do(request{kind: kindRead, offset: block0 * names.BlockSize, mem: []memory.Range{{Start: pageP, Size: page / 2}}})
		},
		broken: observed(func(o blk.Observer) blk.Observer { return rounded{o} }), raced: true,
	},
	{
		name: "twice-in-a-request", rule: "a page that stands twice in a request gets no name",
		play: func(s *stage) { s.do(read(block0, pageP, pageP)) },
		broken: func() mutant {
			return mutant{
				observer: func(o blk.Observer) blk.Observer { return onceOnly{o} },
				host:     func(_, named memory.Tracker) memory.WriteObserver { return &onceTold{WriteObserver: named} },
			}
		},
	},
	{
		name: "balloon-drops-names", rule: "a page that the balloon takes loses its name",
		play: func(s *stage) {
			s.do(read(block0, pageP))
			s.prove(pageP)
			newBalloon(s.t, s.driver.Machine).take(pageP, 1)
		},
		broken: func() mutant {
			return mutant{host: func(_, _ memory.Tracker) memory.WriteObserver { return deaf{} }}
		}, raced: true,
	},
	{
		name: "vmm-writes-spoil-writes", rule: "a page that the VMM changes while it is written to disk gets no name",
		play: func(s *stage) {
			slow := s.begin(0, write(block0, pageP))
			slow.move()
			s.hostWrite(pageP)
			slow.end()
		},
		broken: func() mutant {
			return mutant{host: func(below, _ memory.Tracker) memory.WriteObserver { return below }}
		},
	},
	{
		name: "stores-end-proofs", rule: "before a proven name is used the tracker is asked whether the page was written",
		play: func(s *stage) {
			s.do(read(block0, pageP))
			s.prove(pageP)
			s.store(pageP)
		},
		broken: func() mutant {
			return mutant{tracker: func(t memory.Tracker) memory.Tracker { return blind{t} }}
		}, raced: true,
	},
	{
		name: "armed-before-compared", rule: "a page is armed before it is compared with its block",
		play: func(s *stage) {
			s.do(read(block0, pageP))
			s.prove(pageP)
			s.store(pageP)
		},
		broken: func() mutant {
			late := &lateArm{}
			return mutant{stored: late.vcpuStored, tracker: func(t memory.Tracker) memory.Tracker {
				late.Tracker = t
				return late
			}}
		},
	},
	{
		name: "one-tracker", rule: "whoever arms pages anew does it through the tracker that drops their names",
		play: func(s *stage) {
			s.do(read(block0, pageP))
			s.prove(pageP)
			s.store(pageP)
			s.rearm()
		},
		broken: func() mutant { return mutant{around: true} },
	},
}

// TestRaceFindsBrokenRules lets the race find what the schedules show, where it
// surely does: a race in which nothing is wrong would show little otherwise.
func TestRaceFindsBrokenRules(t *testing.T) {
	const mostRounds = 200
	if labtest.Count(0, 1) == 0 {
		t.Skip("a minute of races; try: make prove ARGS=names-rules-raced")
	}
	found, of := 0, 0
	for _, c := range rules {
		if !c.raced {
			continue
		}
		of++
		t.Run(c.name, func(t *testing.T) {
			r := newRacer(t, disk.CacheWriteback, c.broken())
			defer r.finish()
			for n := range mostRounds {
				if v := r.round(raceRound); len(v.wrong) > 0 {
					t.Logf("%d wrong names after %d rounds", len(v.wrong), n+1)
					found++
					return
				}
			}
			t.Errorf("no wrong name in %d rounds of %d requests without the rule: %s", mostRounds, raceRound, c.rule)
		})
	}
	labtest.Proof(t, "names-rules-raced", "%d of %d broken rules found by the race, within %d pauses each", found, of, mostRounds)
}

// TestRules plays the schedule of each rule twice. With every hook in place it
// names nothing wrongly; without the rule it must.
func TestRules(t *testing.T) {
	found := 0
	for _, c := range rules {
		t.Run(c.name, func(t *testing.T) {
			s := newStage(t, mutant{})
			c.play(s)
			if v := s.look(); len(v.wrong) > 0 {
				t.Errorf("with every hook in place: %q", v.wrong)
			}
		})
		t.Run(c.name+"/broken", func(t *testing.T) {
			s := newStage(t, c.broken())
			c.play(s)
			v := s.look()
			if len(v.wrong) == 0 {
				t.Fatalf("no name is wrong without the rule: %s", c.rule)
			}
			found++
			t.Logf("%q", v.wrong)
		})
	}
	labtest.Proof(t, "names-rules", "%d of %d broken rules give a wrong name, and none is wrong with all of them", found, len(rules))
}

// TestRulesAreListed keeps docs/names.md in line.
func TestRulesAreListed(t *testing.T) {
	text, err := os.ReadFile("../../docs/names.md")
	check(t, err)
	for _, c := range rules {
		_, row, ok := strings.Cut(string(text), "| "+c.rule+" | `"+c.name+"` |")
		row, _, _ = strings.Cut(row, "\n")
		if !ok || strings.Contains(row, "| yes |") != c.raced {
			t.Errorf("docs/names.md does not have the row of %s: %q, raced %t", c.name, c.rule, c.raced)
		}
	}
	if n := strings.Count(string(text), "` | "); n != len(rules) {
		t.Errorf("docs/names.md lists %d rules, there are %d", n, len(rules))
	}
}
