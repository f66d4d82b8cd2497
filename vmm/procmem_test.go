package vmm

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseSmaps(t *testing.T) {
	const text = `00400000-00500000 r-xp 00000000 fd:00 12 /usr/bin/ditto
Size:               1024 kB
Rss:                 800 kB
Anonymous:             0 kB
AnonHugePages:         0 kB
VmFlags: rd ex mr mw me
c000000000-c000400000 rw-p 00000000 00:00 0 [anon: Go: heap]
Rss:                 300 kB
Anonymous:           300 kB
AnonHugePages:         0 kB
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Rss:               10240 kB
Pss:               10240 kB
Anonymous:         10240 kB
AnonHugePages:      8192 kB
7f0010000000-7f0010200000 rw-p 00001000 fd:00 13 /var/snap/pages
Rss:                1024 kB
Pss:                 256 kB
Anonymous:           128 kB
AnonHugePages:         0 kB
7f0020000000-7f0030000000 rw-s 00000000 00:0f 7 /anon_hugepage (deleted)
Rss:                   0 kB
Shared_Hugetlb:     2048 kB
`
	guest := func(start uint64) bool {
		return start == 0x7f0000000000 || start == 0x7f0010000000 || start == 0x7f0020000000
	}
	got, err := parseSmaps(strings.NewReader(text), guest)
	if err != nil {
		t.Fatal(err)
	}
	want := ProcessMemory{
		GuestRAM:    13312 << 10,
		GuestHuge:   10240 << 10,
		GuestPSS:    12544 << 10,
		GuestCopied: 128 << 10,
		Anonymous:   300 << 10,
		Other:       800 << 10,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("parseSmaps (-want +got):\n%s", diff)
	}
	for _, bad := range []string{"zz-500000 r-xp 0 0 0\n", "00400000-00500000 r\nRss: x kB\n"} {
		if got, err := parseSmaps(strings.NewReader(bad), guest); err == nil {
			t.Errorf("parseSmaps(%q) = %+v, want an error", bad, got)
		}
	}
}
