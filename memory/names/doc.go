// Package names keeps, for every page of guest memory, what its bytes equal: a
// block of a disk layer, zeros, another page. Whoever moves or stores the page
// can then move or store its name.
//
// A name is a hint until it is proven. The [Table] records provisional names as
// I/O passes by, at almost no cost; the prover compares quiet pages with their
// blocks once and lets the tracker vouch for them from then on; a [Pass] over the
// paused VM names everything else.
package names
