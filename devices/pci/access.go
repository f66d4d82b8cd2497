package pci

import "encoding/binary"

// ConfigSize is what a function has of configuration space, in bytes. The
// rest of its 4 KiB of ECAM reads as zeros: no extended capabilities.
const ConfigSize = 256

// ecam is the memory-mapped way to configuration space: offset bits 19:15 are
// the slot, 14:12 the function, 11:0 the register.
type ecam struct{ bus *Bus }

// ReadRegister implements devices.Handler.
func (h ecam) ReadRegister(offset uint64, data []byte) {
	h.bus.readConfig(uint32(offset>>12), int(offset&0xFFF), data)
}

// WriteRegister implements devices.Handler.
func (h ecam) WriteRegister(offset uint64, data []byte) {
	h.bus.writeConfig(uint32(offset>>12), int(offset&0xFFF), data)
}

// readConfig reads from the function with the given bus:slot.function number.
// A function that does not exist reads as ones.
func (b *Bus) readConfig(bdf uint32, offset int, data []byte) {
	if e := b.lookup(bdf); e != nil {
		e.ReadConfig(offset, data)
		return
	}
	fill(data, 0xFF)
}

func (b *Bus) writeConfig(bdf uint32, offset int, data []byte) {
	if e := b.lookup(bdf); e != nil {
		e.WriteConfig(offset, data)
	}
}

// lookup finds the endpoint for a bus number (bits 15:8), slot (7:3) and
// function (2:0). Only function 0 of bus 0 exists.
func (b *Bus) lookup(bdf uint32) *Endpoint {
	if bdf>>8 != 0 || bdf&7 != 0 {
		return nil
	}
	return b.endpoint(int(bdf >> 3 & 31))
}

// addressRegister is port CF8: bit 31 enables, 23:8 are bus, slot and
// function, 7:2 the register. Only whole 32-bit accesses reach it.
type addressRegister struct{ bus *Bus }

// ReadRegister implements devices.Handler.
func (h addressRegister) ReadRegister(offset uint64, data []byte) {
	if offset != 0 || len(data) != 4 {
		fill(data, 0xFF)
		return
	}
	h.bus.mu.Lock()
	defer h.bus.mu.Unlock()
	binary.LittleEndian.PutUint32(data, h.bus.address)
}

// WriteRegister implements devices.Handler.
func (h addressRegister) WriteRegister(offset uint64, data []byte) {
	if offset != 0 || len(data) != 4 {
		return
	}
	h.bus.mu.Lock()
	defer h.bus.mu.Unlock()
	// Reserved bits read as zeros.
	h.bus.address = binary.LittleEndian.Uint32(data) & 0x80FFFFFC
}

// dataRegister is port CFC, the register that CF8 chose.
type dataRegister struct{ bus *Bus }

// ReadRegister implements devices.Handler.
func (h dataRegister) ReadRegister(offset uint64, data []byte) {
	bdf, reg, enabled := h.bus.latched()
	if !enabled {
		fill(data, 0xFF)
		return
	}
	h.bus.readConfig(bdf, reg+int(offset), data)
}

// WriteRegister implements devices.Handler.
func (h dataRegister) WriteRegister(offset uint64, data []byte) {
	if bdf, reg, enabled := h.bus.latched(); enabled {
		h.bus.writeConfig(bdf, reg+int(offset), data)
	}
}

// latched takes apart what CF8 holds.
func (b *Bus) latched() (bdf uint32, reg int, enabled bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.address >> 8 & 0xFFFF, int(b.address & 0xFC), b.address>>31 != 0
}

func fill(data []byte, value byte) {
	for i := range data {
		data[i] = value
	}
}
