package names

import (
	"bytes"
	"os"
	"testing"

	"ditto.vm/internal/mutants"
)

// mutation is a safeguard and the same code without it: the text old of a file,
// which stands there once, is replaced by the text without, and the model must
// then find a wrong name. Where old is empty the text is another mutation's, and
// without a name it belongs to the one before.
//
// All of them are compiled into one binary; mutated says which is at work.
type mutation struct {
	name, rule string
	file       string
	old, now   string
}

var mutations = []mutation{
	// Reads.
	{"read-in-flight", "a read drops the names of its pages at its begin, and notes what happens until its end", "io.go",
		"	s := t.enter(l, offset, mem, kindReading)\n	t.mindChanges(s, offset, mem, 0)",
		"	if mutated(`read-in-flight`) { return }\n	s := t.enter(l, offset, mem, kindReading)\n	modelYields()\n" +
			"	if mutated(`read-sees-change`) { return }\n	t.mindChanges(s, offset, mem, 0)"},
	{"", "its end, as if nothing could have happened", "io.go",
		"	t.leave(l, offset, mem, kindReading, done)",
		"	if mutated(`read-in-flight`) {\n		t.eachPair(offset, mem, func(page uint32, block uint64, whole bool) {\n" +
			"			if whole && done { t.Record(t.gpa(page), OfBlock(l, block)) }\n		})\n		return\n	}\n" +
			"	t.leave(l, offset, mem, kindReading, done)"},
	{"read-meets-io", "a page that two reads or writes have at once is not recorded, nor one that stands twice in a request", "io.go",
		"		w := t.load(page)\n		now := w.spoilt() + inFlightOf(kind)",
		"		w := t.load(page)\n		if mutated(`read-meets-io`) && w.chained() && w.kind() != kindNamed { return w.kind(), false }\n		now := w.spoilt() + inFlightOf(kind)"},
	{"read-sees-change", "a read that begins while its block is being changed is not recorded", "io.go", "", ""}, // the text is read-in-flight's
	{"read-looks-last", "a read looks for changes after it stands in the chain", "io.go",
		"func (t *Table) BeginRead(l LayerID, offset int64, mem []memory.Range) {",
		"func (t *Table) BeginRead(l LayerID, offset int64, mem []memory.Range) {\n" +
			"	if mutated(`read-looks-last`) {\n" +
			"		seen := t.changes.others(spanOf(l, offset, total(mem)), 0)\n		modelYields()\n" +
			"		s := t.enter(l, offset, mem, kindReading)\n" +
			"		if seen { t.mindChanges(s, offset, mem, -1) }\n		return\n	}"},
	{"whole-pages", "only a whole page that is a whole block is recorded", "io.go",
		"whole := aligned && at >= m.Start && at+BlockSize <= m.End()",
		"whole := aligned && at >= m.Start && at+BlockSize <= m.End() || mutated(`whole-pages`)"},
	{"aligned-pages", "only a page at a multiple of the block size on disk is recorded", "io.go",
		"aligned := (uint64(offset)^uint64(m.Start))%BlockSize == 0",
		"aligned := (uint64(offset)^uint64(m.Start))%BlockSize == 0 || mutated(`aligned-pages`)"},
	{"done-only", "a request that failed, or was short, is not recorded", "io.go",
		"func (t *Table) depart(page uint32, kind word, k key, done bool) bool {",
		"func (t *Table) depart(page uint32, kind word, k key, done bool) bool {\n	done = done || mutated(`done-only`)"},

	// Writes and erasures.
	{"write-drops-block", "BeginWrite drops the names of the blocks", "io.go",
		"	add(&t.stats.droppedWrite, t.spoil(s))",
		"	modelYields()\n	if !mutated(`write-drops-block`) { add(&t.stats.droppedWrite, t.spoil(s)) }\n	modelYields()"},
	{"write-notes-first", "a write is noted before the block's names are dropped", "io.go",
		"	s := spanOf(l, offset, total(mem))\n	t.changes.begin(s)",
		"	s := spanOf(l, offset, total(mem))\n" +
			"	if mutated(`write-notes-first`) { add(&t.stats.droppedWrite, t.spoil(s)); modelYields(); t.changes.begin(s); t.mindChanges(t.enter(l, offset, mem, kindWriting), offset, mem, 1); return }\n" +
			"	t.changes.begin(s)"},
	{"write-sees-change", "of two writes to a block at once neither is recorded", "io.go",
		"	s = t.enter(l, offset, mem, kindWriting)\n",
		"	s = t.enter(l, offset, mem, kindWriting)\n	modelYields()\n	if mutated(`write-sees-change`) { return }\n" +
			"	if mutated(`write-until-end`) { t.changes.end(s) }\n"},
	{"change-spoils-io", "a read or write in flight whose block is changed is not recorded", "chain.go",
		"		if w.key() != k {\n			link",
		"		if w.key() != k || mutated(`change-spoils-io`) && w.kind() != kindNamed {\n			link"},
	{"write-until-end", "a write is noted until it is over", "io.go", "", ""}, // the text is write-sees-change's
	{"erase-drops-block", "BeginErase drops the names of the blocks", "io.go",
		"	add(&t.stats.droppedErase, t.spoil(s))",
		"	modelYields()\n	if !mutated(`erase-drops-block`) { add(&t.stats.droppedErase, t.spoil(s)) }"},
	{"erase-noted", "an erasure is noted until it is over", "io.go",
		"	s := spanOf(l, offset, n)\n	t.changes.begin(s)",
		"	s := spanOf(l, offset, n)\n	if !mutated(`erase-noted`) { t.changes.begin(s) }"},

	// The VMM, the balloon, the size.
	{"host-drops-page", "what the VMM writes or discards loses its name", "drop.go",
		"func (t *Table) moved(page uint32, w word) bool {",
		"func (t *Table) moved(page uint32, w word) bool {\n	if mutated(`host-drops-page`) && w.kind() == kindNamed { return false }"},
	{"host-spoils-write", "a page that the VMM changes while it is written to disk is not recorded", "drop.go",
		"	for ; w != 0; w = t.load(page) {\n		if w.kind() == kindReading",
		"	if mutated(`host-spoils-write`) && w.kind() == kindWriting { return false }\n	for ; w != 0; w = t.load(page) {\n		if w.kind() == kindReading"},
	{"host-spoils-read", "a page that the VMM changes while it is read from disk is not recorded", "drop.go",
		"w&reportMask == 0 {",
		"(w&reportMask == 0 || mutated(`host-spoils-read`)) {"},
	{"resize-drops", "a layer that is cut short loses the names beyond its end", "drop.go",
		"	add(&t.stats.droppedResize,",
		"	if mutated(`resize-drops`) { return }\n	add(&t.stats.droppedResize,"},
	{"record-inside", "only blocks inside the layer are recorded", "drop.go",
		"layer == nil || s.last >= layer.blocks.Load() ||",
		"layer == nil || s.last >= layer.blocks.Load() && !mutated(`record-inside`) ||"},
	{"record-sees-change", "a block that is being changed is not recorded by the loader", "drop.go",
		"|| t.changes.others(s, 0) {",
		"|| t.changes.others(s, 0) && !mutated(`record-sees-change`) {"},
	{"record-sees-io", "a page that I/O has is not recorded by the loader", "drop.go",
		"	if w := t.load(page); w != 0 && w.kind() != kindNamed {\n		return false",
		"	if w := t.load(page); w != 0 && w.kind() != kindNamed {\n" +
			"		if mutated(`record-sees-io`) { t.leaveChain(page, w, func(word) (word, bool) { return 0, true }); t.join(page, 0, kindNamed|word(makeKey(n.Layer(), n.Number()))) }\n		return false"},

	// Proofs.
	{"compare", "a name is proven by comparing bytes", "proof.go",
		"func (t *Table) endProof(c claim, equal bool) {",
		"func (t *Table) endProof(c claim, equal bool) {\n	modelYields()\n	equal = equal || mutated(`compare`)"},
	{"arm-first", "pages are armed before they are compared", "prover_frame.go",
		"	if err := p.tracker.Arm(frame); err != nil {\n		return p.passOver(w, err)\n	}\n	w.tracked, w.whole = true, true",
		"	if mutated(`arm-first`) { p.prove(frame, w); _ = p.tracker.Tracker.Arm(frame); return nil }\n" +
			"	if err := p.tracker.Arm(frame); err != nil {\n		return p.passOver(w, err)\n	}\n	w.tracked, w.whole = true, true"},
	{"claim", "a drop between claim and end of a proof undoes the proof", "proof.go",
		"		if t.swap(c.page, c.word, c.word&^provingBit|provenWord) {",
		"		if mutated(`claim`) {\n			if w := t.load(c.page); w == 0 { t.join(c.page, 0, c.word&^provingBit|provenWord) }\n		}\n" +
			"		if t.swap(c.page, c.word, c.word&^provingBit|provenWord) {"},
	{"arm-demotes", "what was proven before a page is armed anew is not proven any more", "watched.go",
		"	err := w.Tracker.Arm(r)\n	w.table.demote(r)",
		"	err := w.Tracker.Arm(r)\n	if !mutated(`arm-demotes`) { w.table.demote(r) }"},
	{"demote-proofs", "arming anew undoes proofs that are under way", "watched.go",
		"			if t.swap(page, w, w&^vouchedMask) {",
		"			if mutated(`demote-proofs`) && w&provingBit != 0 { return }\n			if t.swap(page, w, w&^vouchedMask) {"},
	{"collect-drops", "whoever collects written pages drops their names", "watched.go",
		"	for run := range w.set.Runs() {\n		w.table.dropWritten(run)",
		"	for run := range w.set.Runs() {\n		if !mutated(`collect-drops`) || mode == memory.Peek { w.table.dropWritten(run) }"},
	{"collect-proofs", "a written page that is collected undoes its proof under way", "watched.go",
		"vouched := func(w word) (word, bool) { return 0, w.vouched() }",
		"if mutated(`collect-proofs`) && w&provingBit != 0 { return }\n		vouched := func(w word) (word, bool) { return 0, w.vouched() }"},
	{"settle", "names of pages that the tracker reports are dropped before names are used", "watched.go",
		"	return w.collect(r, nil, memory.Peek)",
		"	if mutated(`settle`) { return nil }\n	return w.collect(r, nil, memory.Peek)"},
}

// mutant is the safeguard that is missing, in a mutated binary.
var mutant = os.Getenv(mutants.Env)

// modelYields is what mutated code calls to let the model go on.
func modelYields() { //nolint:unused // mutated code calls it
	if modelYield != nil {
		modelYield()
	}
}

// TestMutants shows that every safeguard is needed: without any one of them the
// model finds a wrong name, and with all it finds none.
func TestMutants(t *testing.T) {
	if testing.Short() {
		t.Skip("builds and runs the model once for each safeguard; leave -short away")
	}
	var edits []mutants.Edit
	for _, m := range mutations {
		if m.old != "" {
			edits = append(edits, mutants.Edit{Name: m.name, File: m.file, Old: m.old, New: m.now})
		}
	}
	binary := mutants.Build(t, "names", edits)
	run := func(name string) ([]byte, error) {
		return mutants.Run(binary, name, "^TestModel$", nil, "DITTO_MODEL_SEEDS=300")
	}
	if out, err := run(""); err != nil {
		t.Fatalf("with all safeguards: %v\n%s", err, out)
	}
	for _, m := range mutations {
		if m.name == "" {
			continue
		}
		t.Run(m.name, func(t *testing.T) {
			out, err := run(m.name)
			if err == nil {
				t.Errorf("nothing is wrong without it: %s", m.rule)
			} else if !bytes.Contains(out, []byte(errWrongName.Error())) {
				t.Errorf("without it the model fails otherwise: %v\n%s", err, out)
			}
		})
	}
}

// TestRules compares RULES.md with the mutations.
func TestRules(t *testing.T) {
	rules, err := os.ReadFile("RULES.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mutations {
		if m.name == "" {
			continue
		}
		if row := "| " + m.rule + " | " + m.name + " | " + m.file + " |"; !bytes.Contains(rules, []byte(row)) {
			t.Errorf("RULES.md lacks the row %q", row)
		}
	}
}
