package vmm

import (
	"context"
	"fmt"

	"ditto.vm/vmm/api"
)

// Memory says what guest memory equals and how it is mapped.
func (m *VM) Memory(_ context.Context, _ api.MemoryQuery) (api.Memory, error) {
	stats, err := m.Stats()
	if err != nil {
		return api.Memory{}, err
	}
	size := m.mem.Size()
	populated := min(stats.GuestResidentBytes, size)
	return api.Memory{
		Bytes: size, Mode: api.MemoryQuick,
		NotPopulatedBytes: size - populated, UnknownBytes: populated,
		Pages4K: stats.Pages4K, Pages2M: stats.Pages2M, Pages1G: stats.Pages1G,
	}, nil
}

// MemoryMap says the same place by place.
func (m *VM) MemoryMap(context.Context, api.MemoryQuery) (api.MemoryMap, error) {
	return api.MemoryMap{}, fmt.Errorf("no names are recorded: %w", api.ErrNotSupported)
}
