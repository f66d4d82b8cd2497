package boot

import (
	"testing"

	"ditto.vm/memory"

	"github.com/google/go-cmp/cmp"
)

func TestMemoryMap(t *testing.T) {
	r := func(start memory.GPA, size uint64) memory.Range { return memory.Range{Start: start, Size: size} }
	low := []E820Entry{{r(0, 0x9fc00), E820RAM}, {r(0x9fc00, 0x60400), E820Reserved}}
	tests := []struct {
		name          string
		ram, reserved []memory.Range
		want          []E820Entry
	}{
		{"plain", []memory.Range{r(0, 8<<20)}, nil, append(low[:2:2], E820Entry{r(1<<20, 7<<20), E820RAM})},
		{"hole in RAM", []memory.Range{r(0, 8<<20)}, []memory.Range{r(4<<20, 1<<20)},
			append(low[:2:2], E820Entry{r(1<<20, 3<<20), E820RAM}, E820Entry{r(4<<20, 1<<20), E820Reserved}, E820Entry{r(5<<20, 3<<20), E820RAM})},
		{"holes that overlap and touch", []memory.Range{r(0, 8<<20)}, []memory.Range{r(5<<20, 1<<20), r(4<<20, 1<<20), r(4<<20, 3<<20)},
			append(low[:2:2], E820Entry{r(1<<20, 3<<20), E820RAM}, E820Entry{r(4<<20, 3<<20), E820Reserved}, E820Entry{r(7<<20, 1<<20), E820RAM})},
		{"hole over the top", []memory.Range{r(0, 8<<20)}, []memory.Range{r(7<<20, 4<<20)},
			append(low[:2:2], E820Entry{r(1<<20, 6<<20), E820RAM}, E820Entry{r(7<<20, 4<<20), E820Reserved})},
		{"hole next to the firmware area", []memory.Range{r(0, 8<<20)}, []memory.Range{r(1<<20, 1<<20)},
			[]E820Entry{low[0], {r(0x9fc00, 0x160400), E820Reserved}, {r(2<<20, 6<<20), E820RAM}}},
		{"two pieces of RAM", []memory.Range{r(0, 2<<20), r(4<<30, 1<<30)}, []memory.Range{r(0xe0000000, 1<<20)},
			append(low[:2:2], E820Entry{r(1<<20, 1<<20), E820RAM}, E820Entry{r(0xe0000000, 1<<20), E820Reserved}, E820Entry{r(4<<30, 1<<30), E820RAM})},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := memoryMap(test.ram, test.reserved)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	var many []memory.Range
	for i := range 128 {
		many = append(many, r(memory.GPA(i)<<30+0xe0000000, 4096))
	}
	for name, reserved := range map[string][]memory.Range{
		"empty": {r(5, 0)}, "wrapping": {r(1<<63, 1<<63+1)}, "too many": many,
	} {
		if _, err := memoryMap([]memory.Range{r(0, 8<<20)}, reserved); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
