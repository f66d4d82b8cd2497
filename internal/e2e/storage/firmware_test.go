package storage

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ditto.vm/internal/labtest"
)

// biosPath is Debian's build of SeaBIOS for QEMU, of the package seabios.
const biosPath = "/usr/share/seabios/bios-256k.bin"

// biosImage returns SeaBIOS with the end of its window for BARs moved into
// ditto's: it puts them below 4 GiB - 20 MiB on any machine but QEMU's, and
// does not read in the ACPI tables where they may lie. Nothing else is changed.
func biosImage(t *testing.T) []byte {
	t.Helper()
	bios, err := os.ReadFile(biosPath)
	if err != nil {
		t.Fatalf("%v; try: apt-get install seabios", err)
	}
	found := 0
	for at := 1; at+4 <= len(bios); at++ {
		// mov ecx, mov ebx or push, with the constant
		if strings.IndexByte("\xb9\xbb\x68", bios[at-1]) >= 0 && binary.LittleEndian.Uint32(bios[at:]) == 0xfec0_0000 {
			binary.LittleEndian.PutUint32(bios[at:], 0xe000_0000)
			found++
		}
	}
	if found != 3 {
		t.Fatalf("%s is another version: %d places hold the end of the BAR window, want 3", biosPath, found)
	}
	return bios
}

// pvhKernel wraps code for 1 MiB into an ELF file with a PVH entry point there.
func pvhKernel(code []byte) []byte {
	const (
		base        = 0x10_0000
		headerSize  = 64
		programSize = 56
		noteAt      = headerSize + 2*programSize
		codeAt      = 0x1000
		machineX86  = 62
		entryNote   = 18 // XEN_ELFNOTE_PHYS32_ENTRY
	)
	le := binary.LittleEndian
	b := make([]byte, codeAt, codeAt+len(code))
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], 2) // an executable
	le.PutUint16(b[18:], machineX86)
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[24:], base)
	le.PutUint64(b[32:], headerSize)
	le.PutUint16(b[52:], headerSize)
	le.PutUint16(b[54:], programSize)
	le.PutUint16(b[56:], 2)
	program := func(i int, kind uint32, offset, address, size uint64) {
		p := b[headerSize+i*programSize:]
		le.PutUint32(p[0:], kind)
		le.PutUint64(p[8:], offset)
		le.PutUint64(p[24:], address)
		le.PutUint64(p[32:], size)
		le.PutUint64(p[40:], size)
		le.PutUint64(p[48:], 4)
	}
	note := le.AppendUint32(nil, 4)
	note = le.AppendUint32(note, 4)
	note = le.AppendUint32(note, entryNote)
	note = le.AppendUint32(append(note, "Xen\x00"...), base)
	copy(b[noteAt:], note)
	program(0, 1, codeAt, base, uint64(len(code)))
	program(1, 4, noteAt, 0, uint64(len(note)))
	return append(b, code...)
}

// TestLabSeaBIOS: a driver that is not Linux's. SeaBIOS finds the disk on PCI,
// boots from it, and its int 13h reads and writes sectors of it.
func TestLabSeaBIOS(t *testing.T) {
	ditto := command(t)
	code, err := os.ReadFile("testdata/firmware.bin")
	if err != nil {
		t.Fatal(err)
	}
	sector, err := os.ReadFile("testdata/bootsector.bin")
	if err != nil {
		t.Fatal(err)
	}
	const imageAt = 0x1_0000 // behind the code, see firmware.s
	code = append(append(code, make([]byte, imageAt-len(code))...), biosImage(t)...)
	for _, cache := range []string{"writeback", "none"} {
		t.Run(cache, func(t *testing.T) {
			dir := t.TempDir()
			kernel, disk := filepath.Join(dir, "seabios"), filepath.Join(dir, "disk")
			content := make([]byte, 1<<20)
			copy(content, sector)
			const last, greeting = 1<<20 - 512, "read by SeaBIOS\r\n"
			copy(content[last:], greeting)
			for path, b := range map[string][]byte{kernel: pvhKernel(code), disk: content} {
				if err := os.WriteFile(path, b, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			g := startGuest(t, ditto, "run", "--kernel", kernel, "--initrd", "none", "--net", "none", "--memory", "256M",
				"--rng", "off", "--balloon", "off", "--on-reboot", "stop", "--disk", disk+",cache="+cache)
			g.waitFor("written")
			<-g.ended
			if !strings.Contains(g.String(), greeting) {
				t.Errorf("the last sector was not read:\n%s", g)
			}
			got, err := os.ReadFile(disk)
			if err != nil {
				t.Fatal(err)
			}
			want := bytes.Clone(content)
			copy(want[last-512:last], content[last:])
			copy(want[last-512:], "!!OK")
			if !bytes.Equal(got, want) {
				t.Errorf("the disk is not what was written; its last sectors begin with %q and %q", got[last-512:][:20], got[last:][:20])
			}
		})
	}
	labtest.Proof(t, "seabios", "SeaBIOS boots from a virtio disk of ditto's, and reads and writes its sectors")
}
