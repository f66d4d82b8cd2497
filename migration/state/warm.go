package state

import "google.golang.org/protobuf/proto"

// Warm does what the first use of every message does: protobuf learns by
// reflection how to encode it, which takes much longer than encoding. Who makes
// a guest stand still while its state is encoded calls it before.
func Warm() {
	for i := range file_state_proto_msgTypes {
		// An empty message: there is nothing that could go wrong.
		_, _ = proto.Marshal(file_state_proto_msgTypes[i].New().Interface())
	}
}
