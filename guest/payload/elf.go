package payload

import (
	"encoding/binary"

	"ditto.vm/memory"
)

// ELF returns the program as an ELF-64 file with a PVH entry note, for a guest
// with ramSize bytes of RAM, which the layout of [memory.Layout] must fit: QEMU's
// q35 ends low RAM at 2 or 3 GiB, so keep to 2 GiB there.
func (p *Program) ELF(ramSize uint64) ([]byte, error) {
	ram, err := memory.Layout(ramSize)
	if err != nil {
		return nil, err
	}
	image, err := p.assemble(ram)
	if err != nil {
		return nil, err
	}
	return image.elf(), nil
}

// elf wraps the image in an ELF header, a PT_NOTE and a PT_LOAD (System V ABI,
// chapters 4 and 5; xen/include/public/elfnote.h).
func (i *image) elf() []byte {
	const (
		headerSize, progSize = 64, 56
		noteOffset, noteSize = headerSize + 2*progSize, 20
		imageOffset          = memory.PageSize

		executable, machineX8664 = 2, 62
		load, note               = 1, 4
		read, write, execute     = 4, 2, 1
		phys32Entry              = 18
	)
	le := binary.LittleEndian
	b := make([]byte, imageOffset, imageOffset+len(i.bytes))
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], executable)
	le.PutUint16(b[18:], machineX8664)
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[24:], i.stub)
	le.PutUint64(b[32:], headerSize)
	le.PutUint16(b[52:], headerSize)
	le.PutUint16(b[54:], progSize)
	le.PutUint16(b[56:], 2)

	program := func(n int, kind, flags uint32, offset, address, size, align uint64) {
		h := b[headerSize+n*progSize:]
		le.PutUint32(h, kind)
		le.PutUint32(h[4:], flags)
		for at, v := range map[int]uint64{8: offset, 16: address, 24: address, 32: size, 40: size, 48: align} {
			le.PutUint64(h[at:], v)
		}
	}
	program(0, note, read, noteOffset, 0, noteSize, 4)
	program(1, load, read|write|execute, imageOffset, uint64(imageBase), uint64(len(i.bytes)), memory.PageSize)

	le.PutUint32(b[noteOffset:], 4)
	le.PutUint32(b[noteOffset+4:], 4)
	le.PutUint32(b[noteOffset+8:], phys32Entry)
	copy(b[noteOffset+12:], "Xen\x00")
	le.PutUint32(b[noteOffset+16:], uint32(i.stub))
	return append(b, i.bytes...)
}
