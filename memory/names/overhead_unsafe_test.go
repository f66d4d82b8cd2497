package names

import (
	"testing"
	"unsafe"
)

// TestOverhead: what names cost of guest memory, and in flight.
func TestOverhead(t *testing.T) {
	tab, _, _ := table(t, 2<<30, 100)
	bytes := uint64(len(tab.words))*8 + uint64(len(tab.inverse.heads)+len(tab.inverse.next))*4 + uint64(len(tab.frames))*8 +
		uint64(unsafe.Sizeof(*tab)) + uint64(len(tab.frames))*uint64(unsafe.Sizeof(watch{}))
	share := float64(bytes) / (2 << 30)
	t.Logf("%d bytes, %.3f %% of 2 GiB", bytes, 100*share)
	if share > 0.005 {
		t.Errorf("names take %.3f %% of guest memory", 100*share)
	}
}
