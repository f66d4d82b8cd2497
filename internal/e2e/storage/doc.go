// Package storage proves what the disks of ditto's guests promise, from end to
// end: the released command, real kernels, real file systems, and the disk as
// others read it afterwards. It holds tests only.
//
//	TestBootPowerCut   outside: labs are killed while guests write and flush
//	TestBootSnapshot.. outside: and while guests are saved
//	TestLab...         inside: content, erasing, locks, foreign drivers
//
// The guest's first process is the test binary itself (see guestMain): it runs
// the job that the kernel's command line names. That is why the binary must be
// linked statically, as `make test` does.
package storage
