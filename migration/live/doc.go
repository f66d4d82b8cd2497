// Package live moves a running VM to another host, by the names of its pages.
//
//	source                                            destination
//	  | hello, offer  -------------------------------->  | looks whether it can be run
//	  |  <-------------------------------------- accept  | makes memory
//	  | rounds: names with digests, zeros, bytes ----->  | proves names from its own disks
//	  |  <---------------- pages whose names were wrong  |
//	  | guest stands; last pages, state, disks given up  |
//	  | prepare -------------------------------------->  | takes disks, makes the VM
//	  |  <--------------------------------------- ready  |
//	  | commit: from here on the VM is the destination's |
//	  |  <------------------------------------- running  |
//	  |  <--- post-copy: asks for pages that are missing |
//
// Exactly one side may run the VM. Until it sends commit, the source takes all
// back after any failure; from then on only the destination decides, and is asked
// for the outcome when the connection ends in that moment ([AskOutcome]). The guest
// never runs on memory that is not what the source read: blocks and duplicates are
// proven by digests, and what the guest wrote meanwhile comes again.
//
// Each side has a goroutine for the state machine, one that reads the control
// connection, one that gives signs of life and one that looks for the peer's. The
// source has workers that read pages and write them to connections; the
// destination has a reader for each data connection and provers that read layers.
//
// The frames are those of migration/wire. This package knows no KVM: [SourceVM]
// and [DestinationVM] are what it needs of VMs.
package live
