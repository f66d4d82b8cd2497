// Package remotemigrate moves a machine to another host with the help of another
// process of its user.
//
//	ditto migrate                             machine's process
//	  Call --- lend ----> operation "migrate" --> Departure.Migrate
//	    |                                            |
//	    |  <----------- ask: connect --------------  live.Send dials
//	    v                                            |
//	  connects, or runs ssh                          v
//	  lends the socket  ------------------------> TLS, frames --> other host
//	    |  <----------- events, end ---------------  |
//
// The machine's process has no right to make connections. The client makes each
// one, to the place that its user named and to no other, and lends it; what goes
// over it, it does not see. TLS is the machine's part, with credentials that the
// client read for it.
//
// [Departure] is what a machine's process knows about leaving: that one migration
// runs at a time, how far it is, and, when the connection ended in the moment of
// the commit, that nobody here knows where the machine is. Such a machine stands
// still until the destination was asked by another Call, or until its user takes
// it back ([Departure.TakeBack]).
package remotemigrate
