package boot

import (
	"bytes"
	"testing"

	"ditto.vm/memory"
)

// FuzzLoad feeds kernels and initrd sizes to the whole loader: whatever the
// bytes say, it reports an error or a state that lies in RAM.
func FuzzLoad(f *testing.F) {
	mem := newSpace(f, 64<<20)
	f.Add(bzImage(), uint16(100))
	f.Add(elfKernel(), uint16(0))
	f.Add(bzImage(put64(offPrefAddress, 1<<20), put32(offInitrdAddrMax, 1<<24)), uint16(0xffff))
	f.Add(elfKernel(put32(elfNotes+4, 4)), uint16(4096))
	f.Fuzz(func(t *testing.T, kernel []byte, initrdSize uint16) {
		config := Config{Kernel: imageOf("k", kernel), Cmdline: "console=ttyS0"}
		if initrdSize > 0 {
			config.Initrd = imageOf("i", bytes.Repeat([]byte{0x5a}, int(initrdSize)))
		}
		loaded, err := Load(mem, config)
		if err != nil {
			return
		}
		var kernelRange memory.Range
		for _, s := range loaded.Segments {
			got, err := mem.View(s.GPA, s.Size)
			if err != nil {
				t.Fatal(err)
			}
			if s.Source == SourceKernel {
				kernelRange = memory.Range{Start: s.GPA, Size: s.Size}
				continue
			}
			if !bytes.Equal(got, bytes.Repeat([]byte{0x5a}, int(initrdSize))) {
				t.Fatal("initrd was overwritten")
			}
		}
		if kernelRange.Start < lowEnd || !mem.Contains(memory.GPA(loaded.Entry.RIP), 1) {
			t.Fatalf("kernel at %s, entry %#x", kernelRange.Start, loaded.Entry.RIP)
		}
	})
}

// FuzzNotes walks arbitrary note segments.
func FuzzNotes(f *testing.F) {
	f.Add(elfKernel()[elfNotes:elfNotes+0x18], uint64(4))
	f.Add(elfKernel()[elfNotes:elfNotes+0x18], uint64(8))
	f.Fuzz(func(t *testing.T, notes []byte, align uint64) {
		if desc, ok := findNote(notes, align, xenNoteName, xenPhys32Entry); ok && len(desc) > len(notes) {
			t.Fatal("descriptor is longer than the segment")
		}
	})
}
