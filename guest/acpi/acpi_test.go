package acpi

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"ditto.vm/memory"
)

// machine is a Config like the one of ditto's machine.
func machine(cpus int) Config {
	const ged = 0xfe000000
	c := Config{
		Area:        memory.Range{Start: 0xe0000, Size: 0x1f000},
		LocalAPIC:   0xfee00000,
		IOAPIC:      0xfec00000,
		Overrides:   []Override{{Source: 0, GSI: 2}, {Source: 9, GSI: 9, Level: true}},
		ECAM:        memory.Range{Start: 0xe0000000, Size: 1 << 20},
		PCIWindow32: memory.Range{Start: 0xc0000000, Size: 0x20000000},
		Power: Power{
			GSI: 9, Events: ged, SleepControl: ged + 0x10, SleepStatus: ged + 0x11,
			Reset: ged + 0x12, ResetValue: 0x42, PowerButton: 1, VMGenID: 2,
		},
		Serial:  []ISADevice{{0x3f8, 4}},
		RTC:     ISADevice{0x70, 8},
		VMGenID: 0xff000,
		PVPanic: 0x505, PMTimer: 0x608,
	}
	for i := range cpus {
		c.APICIDs = append(c.APICIDs, uint32(i))
	}
	return c
}

// machines are the variants that the oracles see.
func machines() map[string]Config {
	wide := machine(64)
	wide.PCIWindow64 = memory.Range{Start: 1 << 38, Size: 1 << 36}
	sparse := machine(3)
	sparse.APICIDs = []uint32{0, 254, 300}
	sparse.Serial = append(sparse.Serial, ISADevice{0x2f8, 3})
	sparse.ECAM.Size = 256 << 20
	bare := machine(1)
	bare.Serial, bare.RTC, bare.VMGenID, bare.PVPanic, bare.PMTimer, bare.Overrides = nil, ISADevice{}, 0, 0, 0, nil
	return map[string]Config{"one CPU": machine(1), "64 CPUs": wide, "x2APIC": sparse, "bare": bare, "255 CPUs": machine(255)}
}

func sum(b []byte) (s byte) {
	for _, v := range b {
		s += v
	}
	return s
}

func TestTablesArePlacedAndSumToZero(t *testing.T) {
	for name, config := range machines() {
		t.Run(name, func(t *testing.T) {
			tables, err := Build(config)
			if err != nil {
				t.Fatal(err)
			}
			mem, err := memory.New(memory.Config{Size: 2 << 20})
			if err != nil {
				t.Fatal(err)
			}
			defer mem.Close()
			if err := tables.Write(mem); err != nil {
				t.Fatal(err)
			}
			found := walk(t, mem, tables.RSDP)
			for _, signature := range []string{"FACP", "APIC", "MCFG", "DSDT"} {
				if found[signature] == nil {
					t.Errorf("%s cannot be reached from the RSDP", signature)
				}
			}
			var end memory.GPA
			for _, table := range tables.Tables {
				if table.GPA%16 != 0 || table.GPA < end || !config.Area.Contains(table.GPA, uint64(len(table.Bytes))) {
					t.Errorf("%s at %s, %d bytes, overlaps or is out of the area", table.Signature, table.GPA, len(table.Bytes))
				}
				if table.Signature != "RSDP" { // which must be first, and points forward
					end = table.GPA + memory.GPA(len(table.Bytes))
				}
			}
		})
	}
}

// walk follows the pointers as a kernel does and returns the tables.
func walk(t *testing.T, mem *memory.Space, at memory.GPA) map[string][]byte {
	t.Helper()
	le := binary.LittleEndian
	view := func(gpa memory.GPA, n uint64) []byte {
		b, err := mem.View(gpa, n)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	root := view(at, 36)
	if string(root[:8]) != "RSD PTR " || sum(root[:20]) != 0 || sum(root) != 0 || root[15] != 2 {
		t.Fatalf("bad RSDP % x", root)
	}
	found := map[string][]byte{}
	follow := func(gpa memory.GPA) []byte {
		b := view(gpa, uint64(le.Uint32(view(gpa, 8)[4:])))
		if sum(b) != 0 {
			t.Errorf("%s does not sum to zero", b[:4])
		}
		found[string(b[:4])] = b
		return b
	}
	x := follow(memory.GPA(le.Uint64(root[24:])))
	for p := x[headerSize:]; len(p) > 0; p = p[8:] {
		follow(memory.GPA(le.Uint64(p)))
	}
	fadt := found["FACP"]
	follow(memory.GPA(le.Uint64(fadt[fadtXDSDT:])))
	if uint64(le.Uint32(fadt[fadtDSDT:])) != le.Uint64(fadt[fadtXDSDT:]) {
		t.Error("the two DSDT pointers differ")
	}
	return found
}

func TestFADT(t *testing.T) {
	config := machine(1)
	b := config.fadt(0xe0040)
	le := binary.LittleEndian
	if len(b) != 276 || b[8] != 6 {
		t.Fatalf("%d bytes, revision %d", len(b), b[8])
	}
	if flags := le.Uint32(b[112:]); flags&(1<<20) == 0 || flags&(1<<10) == 0 {
		t.Errorf("flags %#x lack hardware-reduced or reset", flags)
	}
	if arch := le.Uint16(b[109:]); arch != 1<<2 {
		t.Errorf("IAPC_BOOT_ARCH %#x: want no VGA, no 8042, a CMOS RTC", arch)
	}
	for name, r := range map[string]struct {
		at   int
		want uint64
	}{"reset": {116, 0xfe000012}, "sleep control": {244, 0xfe000010}, "sleep status": {256, 0xfe000011}} {
		if b[r.at] != 0 || b[r.at+1] != 8 || le.Uint64(b[r.at+4:]) != r.want {
			t.Errorf("%s register % x", name, b[r.at:r.at+12])
		}
	}
	if r := b[208:220]; r[0] != 1 || r[1] != 32 || le.Uint64(r[4:]) != 0x608 || le.Uint32(b[112:])&(1<<8) == 0 {
		t.Errorf("timer register % x: want a 32-bit port", r)
	}
	if b[128] != 0x42 {
		t.Errorf("reset value %#x", b[128])
	}
}

func TestAML(t *testing.T) {
	long := bytes.Repeat([]byte{0xa3}, 5000) // NoopOp
	tests := []struct {
		name string
		got  code
		want string // hexadecimal
	}{
		{"zero", integer(0), "00"},
		{"one", integer(1), "01"},
		{"byte", integer(0xff), "0aff"},
		{"word", integer(0x100), "0b0001"},
		{"dword", integer(0x10000), "0c00000100"},
		{"qword", integer(1 << 32), "0e0000000001000000"},
		{"root path", path(`\_SB`), "5c5f53425f"},
		{"dual path", path(`\_SB.PCI0`), "5c2e5f53425f50434930"},
		{"multi path", path(`A.B.C`), "2f03415f5f5f425f5f5f435f5f5f"},
		{"EISA ID", eisaID("PNP0A08"), "0c41d00a08"},
		{"EISA ID with letters", eisaID("PNP0C0C"), "0c41d00c0c"},
		{"small package", list(integer(5), integer(0)), "1205020a0500"},
		{"string", text("ab"), "0d616200"},
		{"scope", scope(`\_SB`, code{0xa3}), "10075c5f53425fa3"},
		{"device", device("PWRB"), "5b820550575242"},
		{"method", method("_EVT", 1, ret(integer(1))), "14085f455654" + "09" + "a401"},
		{"two-byte length", packageLength(long[:63]), "4104" + strings.Repeat("a3", 63)},
		{"three-byte length", packageLength(long[:5000]), "8b3801" + strings.Repeat("a3", 5000)},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if got := fmt.Sprintf("%x", []byte(test.got)); got != test.want {
				t.Errorf("got  %.80s\nwant %.80s", got, test.want)
			}
		})
	}
}

// TestPackageLengthDecodes decodes lengths around each boundary.
func TestPackageLengthDecodes(t *testing.T) {
	for _, n := range []int{0, 1, 62, 63, 64, 4093, 4094, 4095, 1<<20 - 4, 1<<20 - 3, 1 << 20} {
		b := packageLength(make(code, n))
		extra := int(b[0] >> 6)
		got := int(b[0] & 0x3f)
		if extra > 0 {
			got = int(b[0] & 0xf)
			for i := range extra {
				got |= int(b[1+i]) << (4 + 8*i)
			}
		}
		if got != len(b) || len(b) != n+1+extra {
			t.Errorf("%d bytes: length says %d, is %d", n, got, len(b))
		}
	}
}

func TestBuildRefuses(t *testing.T) {
	for name, breakIt := range map[string]func(*Config){
		"no CPU":            func(c *Config) { c.APICIDs = nil },
		"too many CPUs":     func(c *Config) { c.APICIDs = make([]uint32, 256) },
		"area too small":    func(c *Config) { c.Area.Size = 512 },
		"area in RAM":       func(c *Config) { c.Area.Start = 0x100000 },
		"area unaligned":    func(c *Config) { c.Area.Start = 0xe0008 },
		"half a bus":        func(c *Config) { c.ECAM.Size = 1 << 19 },
		"ECAM above 4 GiB":  func(c *Config) { c.ECAM.Start = 1 << 32 },
		"no PCI window":     func(c *Config) { c.PCIWindow32.Size = 0 },
		"window over 4 GiB": func(c *Config) { c.PCIWindow32.Size = 1 << 32 },
		"wrapping window":   func(c *Config) { c.PCIWindow64 = memory.Range{Start: 1 << 63, Size: 1 << 63} },
		"VMGenID in tables": func(c *Config) { c.VMGenID = 0xe0100 },
		"VMGenID, no event": func(c *Config) { c.Power.VMGenID = 0 },
		"no events":         func(c *Config) { c.Power.Events = 0 },
		"ten serial ports":  func(c *Config) { c.Serial = make([]ISADevice, 10) },
	} {
		config := machine(1)
		breakIt(&config)
		if _, err := Build(config); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// iaslSummary is what iasl prints when it compiled a file.
var iaslSummary = regexp.MustCompile(`Compilation successful\. (\d+) Errors, (\d+) Warnings`)

// TestIASL disassembles every table with ACPICA and compiles the result again:
// no error, no warning, and the same bytes.
func TestIASL(t *testing.T) {
	iasl, err := exec.LookPath("iasl")
	if err != nil {
		t.Skip("iasl is not installed; try: apt-get install acpica-tools")
	}
	for name, config := range machines() {
		t.Run(name, func(t *testing.T) {
			tables, err := Build(config)
			if err != nil {
				t.Fatal(err)
			}
			for _, table := range tables.Tables {
				if table.Signature != "RSDP" { // which is no table with a header
					roundTrip(t, iasl, table)
				}
			}
		})
	}
}

// roundTrip disassembles and compiles one table.
func roundTrip(t *testing.T, iasl string, table Table) {
	t.Helper()
	dir := t.TempDir()
	name := strings.ToLower(table.Signature)
	if err := os.WriteFile(filepath.Join(dir, name+".dat"), table.Bytes, 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) string {
		cmd := exec.Command(iasl, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: iasl %v: %v\n%s", table.Signature, args, err, out)
		}
		return string(out)
	}
	if out := run("-d", name+".dat"); strings.Contains(out, "Error") || strings.Contains(out, "Warning") {
		t.Errorf("%s: disassembly:\n%s", table.Signature, out)
	}
	// -oa: no optimization, which would shorten names and integers.
	out := run("-oa", "-p", "again", name+".dsl")
	if m := iaslSummary.FindStringSubmatch(out); table.Signature == "DSDT" && (m == nil || m[1] != "0" || m[2] != "0") {
		t.Errorf("%s: compilation:\n%s", table.Signature, out)
	}
	again, err := os.ReadFile(filepath.Join(dir, "again.aml"))
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Clone(table.Bytes)
	for _, b := range [][]byte{again, want} {
		clear(b[9:10])  // checksum
		clear(b[28:36]) // compiler ID and revision
	}
	if !bytes.Equal(again, want) {
		source, _ := os.ReadFile(filepath.Join(dir, name+".dsl"))
		t.Errorf("%s: compiled again it differs\ngot  % x\nwant % x\n%s", table.Signature, again, want, source)
	}
}
