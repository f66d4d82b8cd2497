// Package vmproc is the life of a machine's process, from its name to its exit
// record.
//
//	name (lease) -> log, sockets -> build the machine -> publish
//	     -> sandbox -> serve API and console -> start the guest -> wait
//	     -> flush the console -> exit record -> release the name
//
// It is the same whether the process is `ditto run` itself or one started by it
// in the background. The machine is an interface, so that all of this is
// tested without KVM.
package vmproc
