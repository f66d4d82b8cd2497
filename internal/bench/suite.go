package bench

// All returns every benchmark, those that need no lab first.
func All() []Benchmark {
	list := []Benchmark{nativeStart(), nativeMemory()}
	list = append(list, trackerWrites()...)
	return append(list,
		framesIdle(), namingPass(), restoreNative(), migrateNative(), migrateCurve(),
		bootLinux(), bootEntry(),
		disk("none"), disk("writeback"), namesDisk(), namesFrames(), network(), snapshotAnchor(), clonesPSS(), migrateAnchor(),
	)
}
