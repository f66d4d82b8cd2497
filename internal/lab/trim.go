package lab

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"
)

// Emulated, a module's signature and type information take longer to check than
// the module takes to start; the lab's kernel insists on neither.
const (
	signatureMagic  = "~Module signature appended~\n"
	signatureHeader = 12 // struct module_signature (include/linux/module_signature.h)
)

// trimModule returns a module without its signature and with its .BTF section
// hidden. What it does not understand it leaves as it is.
func trimModule(module []byte) []byte {
	out := bytes.Clone(trimSignature(module))
	f, err := elf.NewFile(bytes.NewReader(out))
	if err != nil || f.Class != elf.ELFCLASS64 || f.ByteOrder != binary.LittleEndian {
		return out
	}
	// Elf64_Ehdr: e_shoff at 0x28, e_shentsize at 0x3a. Elf64_Shdr: sh_name at 0.
	shoff := binary.LittleEndian.Uint64(out[0x28:])
	entry := uint64(binary.LittleEndian.Uint16(out[0x3a:]))
	for i, sec := range f.Sections {
		if off := shoff + uint64(i)*entry; sec.Name == ".BTF" && off+4 <= uint64(len(out)) {
			binary.LittleEndian.PutUint32(out[off:], 0)
		}
	}
	return out
}

func trimSignature(module []byte) []byte {
	body, ok := bytes.CutSuffix(module, []byte(signatureMagic))
	if !ok || len(body) < signatureHeader {
		return module
	}
	header := body[len(body)-signatureHeader:]
	body = body[:len(body)-signatureHeader]
	// signer_len u8 at 3, key_id_len u8 at 4, sig_len be32 at 8.
	n := uint64(header[3]) + uint64(header[4]) + uint64(binary.BigEndian.Uint32(header[8:]))
	if n > uint64(len(body)) {
		return module
	}
	return body[:uint64(len(body))-n]
}

// Offsets in a bzImage (Linux Documentation/arch/x86/boot.rst).
const (
	offSetupSects    = 0x1f1
	offSetupMagic    = 0x202
	offPayloadOffset = 0x248
	offPayloadLength = 0x24c
	setupHeaderEnd   = 0x268
	sectorBytes      = 512
	maxKernelBytes   = 512 << 20 // of a decompressed kernel
)

// errNotZstd says that an image is not a bzImage compressed with zstd.
var errNotZstd = errors.New("not a bzImage compressed with zstd")

// decompressKernel writes the vmlinux that a bzImage holds, which QEMU boots by
// PVH: emulated, decompressing takes two seconds. Other images are copied.
func decompressKernel(image, dst string) error {
	b, err := os.ReadFile(image)
	if err != nil {
		return err
	}
	vmlinux, err := extractVmlinux(b)
	if err != nil {
		vmlinux = b
	}
	return os.WriteFile(dst, vmlinux, 0o644)
}

// extractVmlinux returns the ELF image in a bzImage.
func extractVmlinux(b []byte) ([]byte, error) {
	if len(b) < setupHeaderEnd || string(b[offSetupMagic:offSetupMagic+4]) != "HdrS" {
		return nil, errNotZstd
	}
	sects := uint64(b[offSetupSects])
	if sects == 0 {
		sects = 4
	}
	start := (sects+1)*sectorBytes + uint64(binary.LittleEndian.Uint32(b[offPayloadOffset:]))
	end := start + uint64(binary.LittleEndian.Uint32(b[offPayloadLength:]))
	if end > uint64(len(b)) || end-start < 8 {
		return nil, errNotZstd
	}
	// The payload ends with the size of what it holds, for the kernel's own use.
	payload := b[start : end-4]
	if binary.LittleEndian.Uint32(payload) != 0xfd2fb528 {
		return nil, errNotZstd
	}
	r, err := zstd.NewReader(bytes.NewReader(payload))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	out, err := io.ReadAll(io.LimitReader(r, maxKernelBytes))
	if err != nil {
		return nil, err
	}
	if !bytes.HasPrefix(out, []byte(elf.ELFMAG)) {
		return nil, errNotZstd
	}
	return out, nil
}
