// Package terminal joins the user's terminal to a machine's console.
//
//	stdin --keys--> Keys (Ctrl-a commands) --> console socket --> guest
//	stdout <------- [CommandOutput] <-------- console socket <-- guest
//
// While joined, the terminal is in raw mode, so that every key reaches the
// guest; it is restored however the session ends: detached, ended, failed or
// interrupted by a signal.
package terminal
