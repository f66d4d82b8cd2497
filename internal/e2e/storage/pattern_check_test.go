package storage

import "testing"

// TestLost shows that the search for lost records finds them.
func TestLost(t *testing.T) {
	const seed, disk, written = 7, 3, 200
	disks := func(change func([]byte)) []byte {
		b := make([]byte, offset(written)+recordSize)
		for seq := uint64(1); seq <= written; seq++ {
			copy(b[offset(seq):], record(seed, disk, seq))
		}
		change(b)
		return b
	}
	for _, c := range []struct {
		name   string
		change func([]byte)
		acked  uint64
		want   int
	}{
		{"all there", func([]byte) {}, written, 0},
		{"more than acknowledged", func([]byte) {}, written - 9, 0},
		{"a bit changed", func(b []byte) { b[offset(100)+4000] ^= 1 }, written, 1},
		{"a ring slot empty", func(b []byte) { clear(b[offset(199):][:recordSize]) }, written, 1},
		{"a ring slot old", func(b []byte) { copy(b[offset(199):], record(seed, disk, 199-2*ringSlots)) }, written, 1},
		{"a later record torn", func(b []byte) { b[offset(199)+4000] ^= 1 }, 198 - 1, 1},
		{"another disk's", func(b []byte) { copy(b[offset(50):], record(seed, disk+1, 50)) }, written, 1},
		{"not acknowledged, not there", func(b []byte) { clear(b[offset(200):]) }, written - 2, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := lost(disks(c.change), seed, disk, c.acked); len(got) != c.want {
				t.Errorf("%d lost, want %d: %q", len(got), c.want, got)
			}
		})
	}
	if got := lost(nil, seed, disk, 4); len(got) != 4 {
		t.Errorf("an empty disk lost %d of 4: %q", len(got), got)
	}
}
