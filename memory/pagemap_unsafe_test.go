package memory

import (
	"strings"
	"testing"
	"unsafe"
)

// TestKernelStructs compares the mirrors with the sizes of include/uapi/linux.
func TestKernelStructs(t *testing.T) {
	for _, tt := range []struct {
		name      string
		got, want uintptr
	}{
		{"pm_scan_arg", unsafe.Sizeof(scanArg{}), 96},
		{"pm_scan_arg.vec", unsafe.Offsetof(scanArg{}.Vec), 40},
		{"pm_scan_arg.return_mask", unsafe.Offsetof(scanArg{}.Return), 88},
		{"page_region", unsafe.Sizeof(pageRegion{}), 24},
		{"uffdio_api", unsafe.Sizeof(uffdAPI{}), 24},
		{"uffdio_register", unsafe.Sizeof(uffdRegister{}), 32},
		{"uffdio_writeprotect", unsafe.Sizeof(uffdWriteProtect{}), 24},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: size or offset %d, want %d", tt.name, tt.got, tt.want)
		}
	}
}

// TestScanManyRuns: a scan that fills the kernel's or our buffer yields every
// run once, in order.
func TestScanManyRuns(t *testing.T) {
	p, err := openPagemap()
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if err := p.supported(); err != nil {
		t.Skipf("PAGEMAP_SCAN: %v; try: Linux 6.7 or newer", err)
	}
	const most = 2*scanRegions + 100
	s := small(t, Config{Size: 2 * most * PageSize, HugePages: HugePagesOff})
	start := uintptr(s.regions[0].HVA)
	written := 0
	for _, n := range []int{1, 511, 512, 513, 1000, 1024, 1025, scanRegions - 1, scanRegions, scanRegions + 1, most} {
		for ; written < n; written++ {
			s.regions[0].mem[2*written*PageSize] = 1
		}
		found := 0
		err := p.scan(start, start+2*most*PageSize, frameScan, func(from, to uintptr, _ uint64) {
			if from != start+uintptr(2*found)*PageSize || to-from != PageSize {
				t.Fatalf("%d runs: run %d is [%#x, +%#x)", n, found, from-start, to-from)
			}
			found++
		})
		if err != nil || found != n {
			t.Errorf("%d runs found, want %d (%v)", found, n, err)
		}
	}
}

func TestParseSmaps(t *testing.T) {
	const text = `7f0000000000-7f0000200000 rw-p 00000000 00:00 0
Size:               2048 kB
Rss:                 100 kB
Pss:                  50 kB
AnonHugePages:      2048 kB
Swap:                  8 kB
VmFlags: rd wr mr mw me ac sd
7f0000200000-7f0000201000 r--p 00000000 fe:00 12    /x: Rss:   9 kB
Rss:                   4 kB
Pss:                   1 kB
KSM:                   4 kB
`
	all := func(uint64, uint64) bool { return true }
	first := func(start, _ uint64) bool { return start == 0x7f0000000000 }
	for _, tt := range []struct {
		name   string
		text   string
		wanted func(uint64, uint64) bool
		want   HostUsage
		bad    bool
	}{
		{"all", text, all, HostUsage{RSS: 104 << 10, PSS: 51 << 10, AnonHugePages: 2 << 20, KSM: 4 << 10, Swap: 8 << 10, VMAs: 2}, false},
		{"first", text, first, HostUsage{RSS: 100 << 10, PSS: 50 << 10, AnonHugePages: 2 << 20, Swap: 8 << 10, VMAs: 1}, false},
		{"empty", "", all, HostUsage{}, false},
		{"not a number", "1000-2000 r\nRss: many kB\n", all, HostUsage{}, true},
	} {
		got, err := parseSmaps(strings.NewReader(tt.text), tt.wanted)
		if (err != nil) != tt.bad || !tt.bad && got != tt.want {
			t.Errorf("%s: %+v, %v, want %+v", tt.name, got, err, tt.want)
		}
	}
}
