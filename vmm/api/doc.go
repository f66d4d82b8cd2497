// Package api is the control API of a running machine: REST over a unix
// socket, described by openapi.yaml, with generated types, server and client
// (api.gen.go).
//
//	ditto stop web --> Remote --api.sock--> Server --> Machine (the VM)
//	Prometheus ------> GET /metrics ------^
//
// [Server] owns its listener's connections and the goroutine of a stop in
// progress; [Server.Close] joins them. The socket's folder is private to the
// user, so whoever reaches the socket may control the machine; requests are
// bounded nevertheless, because a confused script must not harm a guest.
//
// The metrics are written by hand in the text format: client_golang would cost
// every machine's process 1.3 ms and 0.2 MB of start-up (protobuf, procfs) for
// four dozen numbers. A test reads them back with its parser and linter.
package api

//go:generate go run github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen@v2.8.2 -config oapi-codegen.yaml openapi.yaml
