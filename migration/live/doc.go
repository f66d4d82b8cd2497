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
//
// The frames are those of migration/wire. This package knows no KVM: [SourceVM]
// and [DestinationVM] are what it needs of VMs.
package live
