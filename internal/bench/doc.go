// Package bench measures ditto beside other ways of doing the same work, and
// writes what it found as JSON and as the tables of docs/benchmarks.md.
//
//	Benchmark --Open--> Session --Run(contestant)--> Sample
//	    |                                              |
//	    |          warm-up, then rounds: A B C A B C   |
//	    v                                              v
//	 targets  -------------------------------------> Result --> Report
//
// Contestants take turns within a round, and a ratio is computed round by
// round before its median is taken: a host that slows down for a while slows
// both sides of a ratio.
//
// Native benchmarks run where the command was started. Lab benchmarks need a
// KVM that can run Linux; on a host without one a single emulated host
// (internal/lab) is booted and the command runs itself in it, with one JSON
// [Event] a line coming back.
//
// Every child process is started by this package, is given a process group of
// its own and a time limit, and is killed by its process id; a Session that
// was opened is always closed.
package bench
