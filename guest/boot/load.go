package boot

import (
	"errors"

	"ditto.vm/memory"
)

// Load reads kernel and initrd into mem, writes the boot structures and
// returns how to start the first vCPU. The vCPUs must not run yet.
func Load(mem *memory.Space, config Config) (*Loaded, error) {
	return nil, errors.New("boot: not wired yet")
}
