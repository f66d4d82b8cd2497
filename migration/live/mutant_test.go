package live

import (
	"bytes"
	"testing"

	"ditto.vm/internal/mutants"
)

// mutation is a safeguard and the same code without it: the text old of a file,
// which stands there once, is replaced by the text now, and the test must then fail
// and say so.
type mutation struct {
	name, rule string
	file       string
	old, now   string
	test, says string
}

const (
	differ    = "pages differ"
	stormRun  = "^TestStorm$"
	faultRuns = "^TestFaults$"
)

var mutations = []mutation{
	{"name-proof", "a named page is used only if what was read has its digest", "prove.go",
		"	return p.in.r.proves(", "	return mutated(`name-proof`) || p.in.r.proves(", stormRun, differ},
	{"duplicate-proof", "a page is copied from another only if that has its digest", "incoming.go",
		"	if !in.r.proves(", "	if !mutated(`duplicate-proof`) && !in.r.proves(", stormRun, differ},
	{"zero-clears", "a page that was filled is cleared when it is zero later", "incoming.go",
		"		if in.filled.CountIn(r.Start, r.Size) > 0 {", "		if !mutated(`zero-clears`) && in.filled.CountIn(r.Start, r.Size) > 0 {", stormRun, differ},
	{"unproven-fills", "what was read in vain is cleared when the page is zero", "prove.go",
		"	p.in.filled.Add(to.Start, to.Size)\n", "	if !mutated(`unproven-fills`) { p.in.filled.Add(to.Start, to.Size) }\n", stormRun, differ},
	{"names-settle", "a round ends when all its names are proven", "incoming.go",
		"	in.pending.Wait()\n", "	if !mutated(`names-settle`) { in.pending.Wait() }\n", stormRun, ""},
	{"barriers", "a round ends when every connection has its barrier", "receiver.go",
		"	for range r.conns.reserved {\n", "	for range r.conns.reserved {\n		if mutated(`barriers`) { go func() { <-r.barriers }(); continue }\n", stormRun, ""},
	{"read-after-arming", "pages are read after they were armed anew", "converge.go",
		"	s.dirty.Clear()\n	if err := s.vm.Collect(s.dirty); err != nil {",
		"	s.dirty.Clear()\n	if mutated(`read-after-arming`) { late := s.mem.NewPageSet(); defer func() { time.Sleep(3 * time.Millisecond); _ = s.vm.Collect(late) }() }\n" +
			"	if err := s.vm.Collect(s.dirty); err != nil {", stormRun, differ},
	{"collect-in-pause", "what was written since the last round is collected in the pause", "commit.go",
		"	if !s.offer.Untracked {", "	if mutated(`collect-in-pause`) { return nil }\n	if !s.offer.Untracked {", stormRun, differ},
	{"state-first", "the state is saved before the last pages are collected", "commit.go",
		"	sections, err := s.vm.State(s.run)", "	if mutated(`state-first`) { _ = s.vm.Collect(s.dirty); defer func() { _ = s.vm.Collect(s.dirty) }() }\n	sections, err := s.vm.State(s.run)\n" +
			"	if mutated(`state-first`) { _ = s.vm.Collect(s.mem.NewPageSet()) }", stormRun, differ},
	{"asked-again", "pages whose names did not hold are sent as bytes", "converge.go",
		"		s.dirty.Add(r.Start, r.Size)\n	}\n	for r := range s.late", "		if !mutated(`asked-again`) { s.dirty.Add(r.Start, r.Size) }\n	}\n	for r := range s.late",
		stormRun, "pages that were asked for"},
	{"late-again", "pages that a round left for lack of time are sent in the next", "converge.go",
		"		s.dirty.Add(r.Start, r.Size)\n	}\n	s.wanted", "		if !mutated(`late-again`) { s.dirty.Add(r.Start, r.Size) }\n	}\n	s.wanted", stormRun, ""},
	{"record-first", "the commit is recorded before the guest runs", "receiver.go",
		"	if r.o.Committed != nil {", "	if mutated(`record-first`) { _ = r.arrival.Run(context.Background()) }\n	if r.o.Committed != nil {",
		"^TestRecordFails$", "lets the guest run"},
	{"doubt", "the source asks for the outcome before it takes the VM back", "commit.go",
		"		outcome, askErr := AskOutcome(ctx, s.dial, s.token)",
		"		outcome, askErr := AskOutcome(ctx, s.dial, s.token)\n		if mutated(`doubt`) { outcome = OutcomeNever }", faultRuns, "runs"},
	{"take-disks-back", "the source takes the disks back before it lets the guest run", "commit.go",
		"	if s.released {", "	if s.released && !mutated(`take-disks-back`) {", faultRuns, "without its disks"},
	{"abandon", "what had arrived is freed when the migration fails", "receiver.go",
		"	if r.arrival != nil && !r.result.Committed {", "	if r.arrival != nil && !r.result.Committed && !mutated(`abandon`) {", faultRuns, "freed 0 times"},
}

// mutantTries is how often a test may pass although a safeguard is missing.
const mutantTries = 8

// TestMutants shows that every safeguard is needed: without any one of them a test
// fails, and with all of them none does.
func TestMutants(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the tests and runs some for each safeguard; leave -short away")
	}
	var edits []mutants.Edit
	for _, m := range mutations {
		edits = append(edits, mutants.Edit{Name: m.name, File: m.file, Old: m.old, New: m.now})
	}
	binary := mutants.Build(t, "live", edits)
	run := func(name, test string) ([]byte, error) {
		return mutants.Run(binary, name, test, []string{"-test.parallel", "16", "-test.failfast"}, "DITTO_STORM_SEEDS=24")
	}
	if out, err := run("", stormRun); err != nil {
		t.Fatalf("with all safeguards: %v\n%s", err, out)
	}
	for _, m := range mutations {
		t.Run(m.name, func(t *testing.T) {
			out, err := run(m.name, m.test)
			// Some go wrong by chance only, and on a slow machine rarely.
			for tries := 1; err == nil && tries < mutantTries; tries++ {
				out, err = run(m.name, m.test)
			}
			if err == nil {
				t.Errorf("nothing is wrong without it: %s", m.rule)
			} else if !bytes.Contains(out, []byte(m.says)) {
				t.Errorf("without it %s fails otherwise: %v\n%s", m.test, err, out)
			}
		})
	}
}
