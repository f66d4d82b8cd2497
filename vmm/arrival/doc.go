// Package arrival tells a machine's process how far the machine is that arrives
// in it, so that the process can have its sockets made, and its rights dropped,
// between the two moments that count:
//
//	live.Receive --> Construct, Constructed --> (commit point) --> Run, Running
//	                 an error here refuses          nothing may fail here
package arrival
