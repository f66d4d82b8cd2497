package boot

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"ditto.vm/memory"
)

// Sentinels wrapped by the errors of this package, one for each mistake that
// a caller may want to tell from the others.
var (
	// ErrMissing: the file does not exist.
	ErrMissing = errors.New("no such file")
	// ErrNotRegular: it is a directory, a device or the like.
	ErrNotRegular = errors.New("not a regular file: name the file of an image")
	// ErrTruncated: the file is shorter than its own header says.
	ErrTruncated = errors.New("file is truncated: copy or fetch it again")
	// ErrNotKernel: neither a bzImage nor an ELF kernel.
	ErrNotKernel = errors.New("not a kernel image")
	// ErrArchitecture: a kernel, but not for 64-bit x86.
	ErrArchitecture = errors.New("kernel is for another architecture: use one for 64-bit x86")
	// ErrNoPVH: an ELF kernel without the PVH entry note.
	ErrNoPVH = errors.New("kernel has no PVH entry point")
	// ErrNoRoom: kernel or initrd do not fit into guest memory.
	ErrNoRoom = errors.New("does not fit into guest memory: give the machine more")
	// ErrCmdline: the command line is longer than the kernel accepts, or
	// holds a NUL byte.
	ErrCmdline = errors.New("bad kernel command line")
)

// Image is a file to load. Its bytes are read once, into guest memory.
type Image struct {
	Name   string // for messages, usually the path
	Reader io.ReaderAt
	Size   int64 // bytes

	closer io.Closer
}

// OpenImage opens the file at path. It fails with [ErrMissing] when there is
// none, and refuses what is not a regular file.
func OpenImage(path string) (*Image, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", path, ErrMissing)
	}
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s: %w", path, ErrNotRegular)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &Image{Name: path, Reader: f, Size: info.Size(), closer: f}, nil
}

// Close closes the file that [OpenImage] opened.
func (i *Image) Close() error {
	if i == nil || i.closer == nil {
		return nil
	}
	return i.closer.Close()
}

// Config says what to load.
type Config struct {
	Kernel  *Image
	Initrd  *Image // nil for none
	Cmdline string // without a terminating NUL

	// RSDP is where the ACPI root pointer lies, 0 when there is no ACPI.
	RSDP memory.GPA
	// Reserved ranges are reported to the kernel as not usable: ECAM,
	// register pages, APICs. They may lie inside RAM or outside. The range
	// from 0x9fc00 to 1 MiB always is.
	Reserved []memory.Range
}

// Source says which file a segment came from.
type Source int

// The sources. The zero value is not a source.
const (
	SourceKernel Source = iota + 1
	SourceInitrd
)

// String returns kernel or initrd.
func (s Source) String() string {
	switch s {
	case SourceKernel:
		return "kernel"
	case SourceInitrd:
		return "initrd"
	}
	return fmt.Sprintf("Source(%d)", int(s))
}

// FileRange is a part of guest memory that equals a part of a file as long
// as nobody writes it.
type FileRange struct {
	Source Source
	GPA    memory.GPA
	Offset int64  // in the file, bytes
	Size   uint64 // bytes
}

// Protocol is the way in which a kernel is started.
type Protocol int

// The protocols. The zero value is not a protocol.
const (
	ProtocolLinux64 Protocol = iota + 1 // bzImage, 64-bit boot protocol
	ProtocolPVH                         // ELF, PVH
)

// String returns bzImage or PVH.
func (p Protocol) String() string {
	switch p {
	case ProtocolLinux64:
		return "bzImage"
	case ProtocolPVH:
		return "PVH"
	}
	return fmt.Sprintf("Protocol(%d)", int(p))
}

// Loaded is what [Load] did.
type Loaded struct {
	Entry    Entry
	Protocol Protocol
	// Segments are the parts of guest memory that equal parts of the files.
	Segments []FileRange
	// E820 is the memory map that the kernel was given.
	E820 []E820Entry
}
