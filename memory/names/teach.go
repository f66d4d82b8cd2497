package names

import "ditto.vm/memory"

// Teach records in a table what a pass has found and the table does not know:
// the blocks that an index gave. They are provisional there, so that it does not
// matter whether the guest ran meanwhile; the [Prover] proves them. It returns
// how many pages got a name.
func (m *Map) Teach(t *Table) int {
	taught := 0
	for run := range m.Runs() {
		if run.Name.Kind() != Block {
			continue
		}
		for i := range run.Pages {
			gfn := run.Start + memory.GFN(i)
			if t.At(gfn) == 0 && t.Record(gfn.GPA(), OfBlock(run.Name.Layer(), run.Name.Number()+i)) {
				taught++
			}
		}
	}
	return taught
}
