package pci

import (
	"encoding/binary"
	"fmt"
	"sync"
)

// Offsets in a type 0 configuration header (PCI 3.0 6.1).
const (
	regVendor     = 0x00
	regDevice     = 0x02
	regCommand    = 0x04
	regStatus     = 0x06
	regRevision   = 0x08
	regClass      = 0x09
	regCacheLine  = 0x0C
	regLatency    = 0x0D
	regBAR0       = 0x10
	regSubVendor  = 0x2C
	regSubsystem  = 0x2E
	regCapPointer = 0x34
	regIntLine    = 0x3C
	headerSize    = 0x40
)

// Bits of the command and status registers.
const (
	commandMemory      = 1 << 1
	commandBusMaster   = 1 << 2
	commandIntxDisable = 1 << 10
	statusCapabilities = 1 << 4
)

// Identity is what a driver recognizes a function by.
type Identity struct {
	Vendor, Device             uint16
	SubsystemVendor, Subsystem uint16
	Revision                   uint8
	Class                      uint32 // 24 bits: class, subclass, interface
}

// Endpoint is a function's configuration space with its BARs, capabilities
// and MSI-X. It is built with the Add methods, then put on a [Bus]; after that
// the guest owns what is writable.
type Endpoint struct {
	mu       sync.Mutex // guards config, where BARs are mapped, and bus
	config   [ConfigSize]byte
	writable [ConfigSize]byte // bits that the guest may change
	bars     [maxBARs]bar
	caps     []placedCapability
	capEnd   int // first byte after the last capability
	lastNext int // where the last next-pointer is
	msix     *MSIX
	msixCap  int // offset of the MSI-X capability, 0 without
	bus      *Bus
}

// Capability is an entry of the capability list (PCI 3.0 6.7).
type Capability struct {
	ID byte
	// Body follows the ID and the next pointer.
	Body []byte
	// Writable marks the bits of Body that the guest may change; shorter
	// than Body means read-only from there.
	Writable []byte
	// BeforeRead, if not nil, runs before bytes [offset, offset+n) of the
	// capability are read, and AfterWrite after they were written; offset
	// counts from the ID and may be negative when the access began before.
	// Both run on the vCPU's thread and may call Bytes and SetBytes.
	BeforeRead, AfterWrite func(offset, n int)
}

type placedCapability struct {
	Capability
	start, end int
}

// NewEndpoint makes a configuration space with nothing but its identity.
func NewEndpoint(id Identity) *Endpoint {
	e := &Endpoint{capEnd: headerSize, lastNext: regCapPointer}
	le := binary.LittleEndian
	le.PutUint16(e.config[regVendor:], id.Vendor)
	le.PutUint16(e.config[regDevice:], id.Device)
	le.PutUint16(e.config[regSubVendor:], id.SubsystemVendor)
	le.PutUint16(e.config[regSubsystem:], id.Subsystem)
	e.config[regRevision] = id.Revision
	e.config[regClass] = byte(id.Class)
	e.config[regClass+1] = byte(id.Class >> 8)
	e.config[regClass+2] = byte(id.Class >> 16)
	le.PutUint16(e.writable[regCommand:], commandMemory|commandBusMaster|commandIntxDisable)
	e.writable[regCacheLine] = 0xFF
	e.writable[regLatency] = 0xFF
	e.writable[regIntLine] = 0xFF
	return e
}

// Endpoint implements [Function].
func (e *Endpoint) Endpoint() *Endpoint { return e }

// AddCapability appends c to the capability list and returns its offset. It
// fails when the space is full. Call it before the endpoint is on a bus.
func (e *Endpoint) AddCapability(c Capability) (offset int, err error) {
	start := (e.capEnd + 3) &^ 3
	end := start + 2 + len(c.Body)
	if end > ConfigSize {
		return 0, fmt.Errorf("pci: no room for capability %#x of %d bytes", c.ID, len(c.Body))
	}
	e.config[regStatus] |= statusCapabilities
	e.config[e.lastNext] = byte(start)
	e.lastNext = start + 1
	e.config[start] = c.ID
	copy(e.config[start+2:end], c.Body)
	copy(e.writable[start+2:end], c.Writable)
	e.capEnd = end
	e.caps = append(e.caps, placedCapability{c, start, end})
	return start, nil
}

// Bytes copies configuration space at offset into data, without hooks.
func (e *Endpoint) Bytes(offset int, data []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	copy(data, e.config[offset:])
}

// SetBytes changes configuration space at offset, whether the guest may write
// it or not, without hooks. It is for the data of capabilities.
func (e *Endpoint) SetBytes(offset int, data []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	copy(e.config[offset:], data)
}

// ReadConfig reads configuration space. Any offset and size are allowed; what
// lies beyond the end reads as zeros.
func (e *Endpoint) ReadConfig(offset int, data []byte) {
	fill(data, 0)
	if offset < 0 || offset >= ConfigSize {
		return
	}
	for _, c := range e.touched(offset, len(data)) {
		if c.BeforeRead != nil {
			c.BeforeRead(offset-c.start, len(data))
		}
	}
	e.Bytes(offset, data)
}

// WriteConfig writes configuration space. Any offset and size are allowed;
// bits that are not writable keep their value.
func (e *Endpoint) WriteConfig(offset int, data []byte) {
	if offset < 0 || offset >= ConfigSize {
		return
	}
	data = data[:min(len(data), ConfigSize-offset)]
	e.write(offset, data)
	for _, c := range e.touched(offset, len(data)) {
		if c.AfterWrite != nil {
			c.AfterWrite(offset-c.start, len(data))
		}
	}
}

// write stores the writable bits and lets BARs and MSI-X follow.
func (e *Endpoint) write(offset int, data []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i, v := range data {
		mask := e.writable[offset+i]
		e.config[offset+i] = e.config[offset+i]&^mask | v&mask
	}
	e.followBARs()
	e.followMSIX()
}

// touched lists the capabilities that [offset, offset+n) overlaps. The list
// of capabilities does not change once the endpoint is on a bus.
func (e *Endpoint) touched(offset, n int) []placedCapability {
	first, last := len(e.caps), -1
	for i, c := range e.caps {
		if offset < c.end && c.start < offset+n {
			first, last = min(first, i), i
		}
	}
	if last < 0 {
		return nil
	}
	return e.caps[first : last+1]
}

// attach connects the endpoint to its bus.
func (e *Endpoint) attach(b *Bus) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.bus = b
	e.followBARs()
}
