package boot

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"ditto.vm/memory"
)

// minMemory is what the boot structures and the firmware area need.
const minMemory = 2 << 20

// Load reads kernel and initrd into mem, writes the boot structures and
// returns how to start the first vCPU. No vCPU may run meanwhile. After an
// error the contents of mem are undefined.
func Load(mem *memory.Space, config Config) (*Loaded, error) {
	if err := config.check(); err != nil {
		return nil, err
	}
	if mem.Size() < minMemory {
		return nil, fmt.Errorf("memory of %d KiB is too small to boot anything; give the guest at least %d MiB: %w", mem.Size()>>10, minMemory>>20, ErrNoRoom)
	}
	protocol, head, err := identify(config.Kernel)
	if err != nil {
		return nil, fmt.Errorf("kernel %w", err)
	}
	var ram []memory.Range
	for _, r := range mem.Regions() {
		ram = append(ram, r.Range)
	}
	e820, err := memoryMap(ram, config.Reserved)
	if err != nil {
		return nil, err
	}
	l := &loader{mem: mem, config: config, e820: e820, loaded: Loaded{Protocol: protocol, E820: e820}}
	if protocol == ProtocolPVH {
		err = l.loadPVH(head)
	} else {
		err = l.loadLinux64(head)
	}
	if err != nil {
		return nil, err
	}
	return &l.loaded, nil
}

// Check tells whether [Load] takes the kernel, as far as the file alone says.
// It reads headers only and needs no memory.
func Check(kernel *Image) error {
	protocol, head, err := identify(kernel)
	if err != nil {
		return fmt.Errorf("kernel %w", err)
	}
	if protocol == ProtocolLinux64 {
		_, err = parseSetupHeader(head, kernel.Size)
	} else {
		var headers []progHeader
		if headers, err = parseELF(kernel, head); err == nil {
			_, err = findPVHEntry(kernel, headers)
		}
	}
	if err != nil {
		return fmt.Errorf("kernel %s: %w", kernel.Name, err)
	}
	return nil
}

// check validates what does not depend on the kernel.
func (c *Config) check() error {
	if c.Kernel == nil {
		return fmt.Errorf("no kernel given: %w", ErrMissing)
	}
	if strings.IndexByte(c.Cmdline, 0) >= 0 {
		return fmt.Errorf("kernel command line holds a NUL byte: %w", ErrCmdline)
	}
	if len(c.Cmdline) >= maxCmdline {
		return tooLong(c.Cmdline, maxCmdline-1)
	}
	return nil
}

// tooLong is the error for a command line above limit bytes.
func tooLong(cmdline string, limit int) error {
	return fmt.Errorf("kernel command line of %d bytes is longer than the %d that the kernel accepts: %w", len(cmdline), limit, ErrCmdline)
}

// headSize is how much of a kernel is read to tell what it is: the setup
// header of a bzImage ends below 0x300.
const headSize = 0x400

// magicAt is a signature of something that is not a kernel for this machine.
type magicAt struct {
	offset int
	magic  string
	what   string
	err    error
}

// strangers are files that users take for kernels.
var strangers = []magicAt{
	{0x38, "ARM\x64", "an arm64 Image", ErrArchitecture},
	{0x38, "RSC\x05", "a RISC-V Image", ErrArchitecture},
	{0x24, "\x18\x28\x6f\x01", "a 32-bit ARM zImage", ErrArchitecture},
	{0x04, "zimg", "an EFI zboot image, which x86 does not use", ErrArchitecture},
	{0, "\x27\x05\x19\x56", "a U-Boot uImage", ErrNotKernel},
	{0, "\x1f\x8b", "a gzip file; decompress it first", ErrNotKernel},
	{0, "\xfd7zXZ\x00", "an xz file; decompress it first", ErrNotKernel},
	{0, "\x28\xb5\x2f\xfd", "a zstd file; decompress it first", ErrNotKernel},
	{0, "070701", "a cpio archive, an initrd perhaps", ErrNotKernel},
	{0, "QFI\xfb", "a qcow2 disk image", ErrNotKernel},
}

// identify tells the protocol of a kernel by its content and returns the
// beginning of the file, zero-padded to headSize bytes.
func identify(image *Image) (Protocol, []byte, error) {
	head := make([]byte, headSize)
	if image.Size <= 0 {
		return 0, nil, fmt.Errorf("%s: file is empty: %w", image.Name, ErrNotKernel)
	}
	n := min(int64(headSize), image.Size)
	if err := image.readAt(head[:n], 0); err != nil {
		return 0, nil, err
	}
	if bytes.HasPrefix(head, []byte(elfMagic)) {
		return ProtocolPVH, head, nil
	}
	if binary.LittleEndian.Uint16(head[offBootFlag:]) == bootFlag && string(head[offHeader:offHeader+4]) == headerMagic {
		return ProtocolLinux64, head, nil
	}
	for _, s := range strangers {
		if bytes.HasPrefix(head[s.offset:], []byte(s.magic)) {
			return 0, nil, fmt.Errorf("%s: is %s: %w", image.Name, s.what, s.err)
		}
	}
	return 0, nil, fmt.Errorf("%s: neither a bzImage nor an ELF file, which Debian calls vmlinuz and vmlinux: %w", image.Name, ErrNotKernel)
}
