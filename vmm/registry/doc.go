// Package registry knows which machines of this user run, and where their
// sockets and logs are.
//
//	$XDG_RUNTIME_DIR/ditto/          0700; or /run/user/UID, or /tmp/ditto-UID
//	  .lock                          serializes starts and clean-ups
//	  NAME/
//	    lock                         held (flock) as long as the machine lives
//	    pid
//	    state.json                   what the machine was started with
//	    api.sock  console.sock  ops.sock
//	$XDG_STATE_HOME/ditto/NAME/
//	    console.log  console.log.1   what the guest printed, capped
//	    exit.json                    how it ended
//
// A machine exists as long as its lock is held, and the kernel drops the lock
// with the process: a pid that was reused cannot be mistaken for a machine, and
// what a killed process left is swept by the next who looks. The machine's own
// process takes the lock ([Registry.Acquire]) and owns everything in its
// folder; all others only read.
package registry
