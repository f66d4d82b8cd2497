// Package wire is what hosts say to each other while a VM moves: a preamble for
// each connection, and frames.
//
//	preamble   magic, versions, role, token          both ways, once
//	frame      magic, type, flags, length, head      24 bytes
//	           checksum of header and head
//	           head      the message, or what the payload is of
//	           payload   pages, where the type has them
//
// Numbers are little-endian. docs/migration-protocol.md has every byte, the order
// of messages, and the commit point. Lengths are bounded by the type of the frame
// before anything is allocated, and what a message says is checked by its decoder;
// whether it makes sense for this VM is for the caller to see.
package wire
