// Package vmm composes a virtual machine out of KVM, guest memory, devices and
// a boot image, and runs it.
//
//	         control API, signals
//	                |
//	supervisor <- requests -- VM -- Pause, Resume, Stop, Kill
//	 (reset,                  |
//	  end)          +---------+-----------+
//	                |         |           |
//	           vCPU threads  workers   interrupts
//	           (KVM_RUN,    (queues)   (routes,
//	            registers)              irqfds)
//	                |         |
//	                +-- guest memory --+
//
// Lifecycle: [New] opens everything that needs rights; the caller may then
// drop them; [VM.Start] loads the kernel and enters the guest; [VM.Wait] returns
// when the guest has ended for good, with everything joined; [VM.Close] frees
// the memory and descriptors. [VM.SaveState] writes down what a paused VM is apart
// from its memory, and [Restore] makes a paused VM of it. [VM.Save] makes a
// snapshot of all of it while the guest runs, with the help of a process that has
// the rights to (package savehost). [VM.MigrationSource] and [Destination] are the two
// ends of a live migration (migration/live): the source gives up its disks before
// the destination takes them, and runs again only with its disks taken back.
//
//	created --Start--> running <--Pause/Resume--> paused <--Restore
//	                      \__________________________/
//	                                   | power-off, kill, failure
//	                                   v
//	                                stopped
//
// Threads: one locked OS thread per vCPU owns its KVM descriptor and takes
// acknowledged commands; device workers own their queues; the supervisor alone
// resets and ends the machine, because a vCPU or a worker that asks for it
// cannot join itself.
package vmm
