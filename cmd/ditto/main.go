// Ditto runs virtual machines on KVM. See "ditto --help", and docs/cli for the
// same as pages.
package main

import (
	"os"

	"ditto.vm/cmd/ditto/internal/cli"
)

//go:generate go run ./internal/gendocs ../../docs/cli

// version is set by the linker (make build).
var version string

func main() { os.Exit(cli.Main(version, os.Args[1:])) }
