// Command aptconf writes ditto's private apt configuration and prints its path,
// for apt-get -c. It is how scripts/setup reaches bookworm-backports without
// changing the system's sources.
package main

import (
	"context"
	"fmt"
	"os"

	"ditto.vm/images/debian"
)

func main() {
	archive, err := debian.Open(context.Background(), "", nil)
	if err != nil {
		fmt.Fprintln(os.Stderr, "aptconf:", err)
		os.Exit(1)
	}
	fmt.Println(archive.ConfigPath())
}
