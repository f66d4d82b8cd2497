// Package lend lets another process of the user lend descriptors to a machine's
// process, which has given up the right to open files and to connect. One
// connection is one operation, such as a save.
//
//	client                                    machine
//	  | hello: version, operation, options --->  |
//	  |                                          | runs the operation
//	  |  <--- ask: what, arguments               |   [Session.Ask]
//	  |    opens, makes, removes                 |
//	  | answer: reply + descriptors --->         |
//	  |  <--- event: how far it is               |   [Session.Tell]
//	  |  <--- end: result or failure             |
//
// The socket is a SOCK_SEQPACKET of the unix domain that listens before the
// machine drops its rights (unix(7)). A packet is a message: JSON, at most
// [MaxMessage] bytes, with at most [MaxFiles] descriptors (SCM_RIGHTS). What is
// longer, has more, or says anything that its kind does not, ends the connection.
//
// The client cancels an operation by a message, and goes on answering until the
// end, so that the operation can undo what it did through the client. A client
// that is gone cancels it too; what the machine asks for then fails with
// [ErrGone].
//
// Neither end trusts the other. The machine may have been taken over by its
// guest: whoever answers decides by what the user said and not by what is
// asked. The machine looks at every descriptor before it uses it
// ([CheckRegular]).
//
// Errors cross the connection as text. Those that a caller decides by are named
// in [Kinds], which both ends share, and are found again with errors.Is; so are
// error numbers of the system.
package lend
