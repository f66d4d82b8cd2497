// Package migratetest has machines that are none, for tests of what is around
// migrations: memory, and a [World] that knows who lets the guest run and who has
// its disks.
//
//	World <--- Source (live.SourceVM)      runs from the start
//	      <--- Arrival (live.Arrival)      runs when it was told to
package migratetest
