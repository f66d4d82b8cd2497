// Package names keeps, for every page of guest memory, what its bytes equal: a
// block of a disk layer, zeros, another page. Whoever moves or stores the page
// can then move or store its name.
//
// A name is a hint until it is proven. The [Table] records provisional names as
// I/O passes by, at almost no cost; the [Prover] compares quiet pages with their
// blocks once and lets the tracker vouch for them from then on; a [Pass] over the
// paused VM names everything else.
//
//	disk I/O --- Begin, End ---> Table <--- claim, end --- Prover
//	loaders ---- Record -------->  ^ ^                       |  reads blocks,
//	                               | |                       |  arms frames
//	Space.Wrote --> HostWrite -----+ +---- demote, drop      v
//	                        Watched: Arm, Collect, ... ---> memory.Tracker
//
// What is true when: a proven name is true unless the page was written since, and
// the tracker reports that page. [Prover.Settle] asks it; afterwards, on a VM that
// is paused and whose devices are drained, every proven name is true. A name that
// is not proven says only where to look. Wrong bytes must never come of either:
// who gets a name from elsewhere checks what it reads.
//
// The orders on which this rests stand in io.go (why no name outlives a change of
// its block or its page), proof.go (why what is compared stays true) and
// watched.go (why no write is forgotten). RULES.md lists every rule with the test
// that fails without it.
package names
