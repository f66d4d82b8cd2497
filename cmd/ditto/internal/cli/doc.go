// Package cli is the command line of ditto: flags, tables, progress and the
// terminal. One file a subcommand; no logic that would be missed without a
// terminal.
//
//	Main -- VMProcessArg --> child.go: a machine's process, in the background
//	     -- otherwise -----> the cobra tree of [NewRoot]
//	                           run: terminal? -> start a child, attach to it
//	                                script?   -> run the machine right here
//
// Results go to standard output, as a table or with --json; everything else to
// standard error, one line an error. Exit codes are those of package exit.
package cli
