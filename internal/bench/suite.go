package bench

// All returns every benchmark, those that need no lab first.
func All() []Benchmark {
	return []Benchmark{
		nativeStart(), nativeMemory(),
		bootLinux(), bootEntry(),
		disk("none"), disk("writeback"), network(),
	}
}
