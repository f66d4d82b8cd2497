package lab

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// sign appends a signature as the kernel's build does.
func sign(module []byte) []byte {
	sig := []byte("signature of signer and key")
	header := make([]byte, signatureHeader)
	header[3], header[4] = 2, 3
	binary.BigEndian.PutUint32(header[8:], uint32(len(sig)-5))
	out := append(bytes.Clone(module), sig...)
	return append(append(out, header...), signatureMagic...)
}

func TestTrimSignature(t *testing.T) {
	module := []byte("any module")
	if got := trimSignature(sign(module)); !bytes.Equal(got, module) {
		t.Errorf("trimSignature = %q, want %q", got, module)
	}
	for name, b := range map[string][]byte{
		"unsigned":   module,
		"empty":      {},
		"magic only": []byte(signatureMagic),
		"signature longer than the file": append(
			[]byte{0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff}, signatureMagic...),
	} {
		if got := trimSignature(b); !bytes.Equal(got, b) {
			t.Errorf("%s: %q became %q", name, b, got)
		}
	}
}

// elfWithBTF is an ELF file with the sections .BTF and .shstrtab.
func elfWithBTF() []byte {
	names := "\x00.BTF\x00.shstrtab\x00"
	b := make([]byte, 64+3*64)
	copy(b, "\x7fELF\x02\x01\x01")
	le := binary.LittleEndian
	le.PutUint16(b[16:], 1)
	le.PutUint16(b[18:], 62)
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[40:], 64)
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[58:], 64)
	le.PutUint16(b[60:], 3)
	le.PutUint16(b[62:], 2)
	le.PutUint32(b[128:], 1)
	le.PutUint32(b[132:], 1)
	le.PutUint64(b[152:], uint64(len(b)))
	le.PutUint32(b[192:], 6)
	le.PutUint32(b[196:], 3)
	le.PutUint64(b[216:], uint64(len(b)))
	le.PutUint64(b[224:], uint64(len(names)))
	return append(b, names...)
}

func TestTrimModuleHidesBTF(t *testing.T) {
	module := elfWithBTF()
	before, err := elf.NewFile(bytes.NewReader(module))
	if err != nil || before.Section(".BTF") == nil {
		t.Fatalf("the fixture has no .BTF: %v", err)
	}
	trimmed := trimModule(sign(module))
	after, err := elf.NewFile(bytes.NewReader(trimmed))
	if err != nil {
		t.Fatal(err)
	}
	if after.Section(".BTF") != nil {
		t.Error(".BTF is still there")
	}
	if after.Section(".shstrtab") == nil || len(trimmed) != len(module) {
		t.Error("something else was changed")
	}
}

func FuzzTrimModule(f *testing.F) {
	f.Add(sign(elfWithBTF()))
	f.Add([]byte(signatureMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		if got := trimModule(b); len(got) > len(b) {
			t.Errorf("%d bytes became %d", len(b), len(got))
		}
	})
}

// bzImage wraps a payload into a setup header.
func bzImage(payload []byte) []byte {
	b := make([]byte, 2*sectorBytes)
	b[offSetupSects] = 1
	copy(b[offSetupMagic:], "HdrS")
	binary.LittleEndian.PutUint32(b[offPayloadOffset:], 0)
	binary.LittleEndian.PutUint32(b[offPayloadLength:], uint32(len(payload)))
	return append(b, payload...)
}

func zstdPayload(t testing.TB, text string) []byte {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return append(w.EncodeAll([]byte(text), nil), 1, 2, 3, 4)
}

func TestDecompressKernel(t *testing.T) {
	const vmlinux = "\x7fELF and so on"
	for name, tc := range map[string]struct{ image, want []byte }{
		"zstd":           {bzImage(zstdPayload(t, vmlinux)), []byte(vmlinux)},
		"not ELF inside": {bzImage(zstdPayload(t, "MZ")), nil},
		"xz":             {bzImage([]byte("\xfd7zXZ\x00\x00 payload")), nil},
		"vmlinux":        {[]byte(vmlinux), nil},
		"cut":            {bzImage(zstdPayload(t, vmlinux))[:1030], nil},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			src, dst := filepath.Join(dir, "image"), filepath.Join(dir, "out")
			if err := os.WriteFile(src, tc.image, 0o644); err != nil {
				t.Fatal(err)
			}
			if err := decompressKernel(src, dst); err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(dst)
			if err != nil {
				t.Fatal(err)
			}
			want := tc.want
			if want == nil {
				want = tc.image
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%d bytes, want %d", len(got), len(want))
			}
		})
	}
}

func FuzzExtractVmlinux(f *testing.F) {
	f.Add(bzImage(zstdPayload(f, "\x7fELF")))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			return
		}
		if out, err := extractVmlinux(b); err == nil && !bytes.HasPrefix(out, []byte(elf.ELFMAG)) {
			t.Error("what was extracted is not ELF")
		}
	})
}
