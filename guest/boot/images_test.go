package boot

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ditto.vm/memory"
)

// newSpace maps size bytes of guest memory for a test.
func newSpace(t testing.TB, size uint64) *memory.Space {
	t.Helper()
	mem, err := memory.New(memory.Config{Size: size, HugePages: memory.HugePagesOff})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mem.Close(); err != nil {
			t.Error(err)
		}
	})
	return mem
}

// imageOf wraps bytes as a file.
func imageOf(name string, b []byte) *Image {
	return &Image{Name: name, Reader: bytes.NewReader(b), Size: int64(len(b))}
}

// patch is a change to a synthetic kernel.
type patch func([]byte)

func put8(at int, v byte) patch { return func(b []byte) { b[at] = v } }
func put16(at int, v uint16) patch {
	return func(b []byte) { binary.LittleEndian.PutUint16(b[at:], v) }
}
func put32(at int, v uint32) patch {
	return func(b []byte) { binary.LittleEndian.PutUint32(b[at:], v) }
}
func put64(at int, v uint64) patch {
	return func(b []byte) { binary.LittleEndian.PutUint64(b[at:], v) }
}

// bzImage makes a small kernel with a valid header, then applies the patches.
func bzImage(patches ...patch) []byte {
	const setupSects, codeSize = 3, 0x1000
	b := make([]byte, (setupSects+1)*sector+codeSize)
	for i := (setupSects + 1) * sector; i < len(b); i++ {
		b[i] = byte(i * 7)
	}
	copy(b[offHeader:], headerMagic)
	for _, p := range append([]patch{
		put8(offSetupSects, setupSects), put32(offSyssize, codeSize/16), put16(offBootFlag, bootFlag),
		put16(offJump, 0x6aeb), put16(offVersion, 0x020f), put8(offLoadflags, loadedHigh),
		put32(offInitrdAddrMax, 0x7fffffff), put32(offKernelAlignment, 2<<20), put8(offRelocatable, 1),
		put16(offXloadflags, kernel64), put32(offCmdlineSize, 2047), put64(offPrefAddress, 16<<20),
		put32(offInitSize, 8<<20),
	}, patches...) {
		p(b)
	}
	return b
}

// Where the synthetic ELF kernel has its parts.
const (
	elfNotes   = 0x200
	elfCode    = 0x1000
	elfEntryPA = 0x1000010
)

// elfKernel makes a small PVH kernel: one note segment, one PT_LOAD at 16 MiB
// of 0x800 file bytes and 0x3000 memory bytes.
func elfKernel(patches ...patch) []byte {
	b := make([]byte, elfCode+0x800)
	copy(b, "\x7fELF\x02\x01\x01")
	for i := elfCode; i < len(b); i++ {
		b[i] = byte(i*13 + 1)
	}
	note := elfHeaderSize
	load := note + progHeaderSize
	copy(b[elfNotes+12:], xenNoteName)
	for _, p := range append([]patch{
		put16(16, 2), put16(18, elfMachineX8664), put32(20, 1), put64(32, elfHeaderSize),
		put16(52, elfHeaderSize), put16(54, progHeaderSize), put16(56, 2),
		put32(note, progNote), put64(note+8, elfNotes), put64(note+32, 0x18), put64(note+40, 0x18), put64(note+48, 4),
		put32(elfNotes, 4), put32(elfNotes+4, 8), put32(elfNotes+8, xenPhys32Entry), put64(elfNotes+16, elfEntryPA),
		put32(load, progLoad), put64(load+8, elfCode), put64(load+24, 16<<20), put64(load+32, 0x800), put64(load+40, 0x3000),
	}, patches...) {
		p(b)
	}
	return b
}

// corpus returns the paths of u-root's bzImages.
func corpus(t testing.TB) []string {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/u-root/u-root").Output()
	dir := strings.TrimSpace(string(out))
	if err != nil || dir == "" {
		t.Skip("u-root's module is not in the module cache; try: go mod download github.com/u-root/u-root")
	}
	paths, err := filepath.Glob(filepath.Join(dir, "pkg/boot/bzimage/testdata/bz[iI]mage*"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no bzImages in %s: %v", dir, err)
	}
	return paths
}

// readFile reads a file of the corpus.
func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
