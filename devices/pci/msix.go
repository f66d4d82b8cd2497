package pci

import (
	"encoding/binary"
	"fmt"
	"sync"

	"ditto.vm/devices"
	"ditto.vm/memory"
)

// MSI-X structures (PCI 3.0 6.8.2).
const (
	capMSIX        = 0x11
	msixEnable     = 1 << 15
	msixMaskAll    = 1 << 14
	msixEntrySize  = 16
	msixMasked     = 1 // bit 0 of the vector control word
	maxMSIXVectors = 2048
)

// MSIX is a function's MSI-X table and pending bits. Vectors are triggered
// from any goroutine; the guest programs them from vCPU threads.
//
// KVM replaces its whole routing table for one changed message, and drivers
// program vectors one after the other: a message is therefore routed when it
// is first needed, together with all others that changed.
type MSIX struct {
	alloc devices.MSIAllocator
	msis  []devices.MSI

	mu      sync.Mutex // guards what follows
	table   []byte     // as the guest sees it
	pba     []byte     // one pending bit a vector, in units of 8 bytes
	routed  []devices.MSIMessage
	enabled bool
	masked  bool // the function mask

	changedMSIs     []devices.MSI // scratch space of route
	changedMessages []devices.MSIMessage
}

// NewMSIX reserves n vectors.
func NewMSIX(alloc devices.MSIAllocator, n int) (*MSIX, error) {
	if n < 1 || n > maxMSIXVectors {
		return nil, fmt.Errorf("pci: %d MSI-X vectors", n)
	}
	msis, err := alloc.AllocateMSIs(n)
	if err != nil {
		return nil, fmt.Errorf("pci: allocate %d MSI-X vectors: %w", n, err)
	}
	m := &MSIX{
		alloc: alloc, msis: msis,
		table:  make([]byte, n*msixEntrySize),
		pba:    make([]byte, (n+63)/64*8),
		routed: make([]devices.MSIMessage, n),

		changedMSIs:     make([]devices.MSI, 0, n),
		changedMessages: make([]devices.MSIMessage, 0, n),
	}
	for i := range n {
		m.table[i*msixEntrySize+12] = msixMasked
		m.routed[i].Masked = true
	}
	return m, nil
}

// Close gives the vectors back.
func (m *MSIX) Close() { m.alloc.FreeMSIs(m.msis) }

// Vectors is the number of table entries.
func (m *MSIX) Vectors() int { return len(m.msis) }

// Trigger delivers vector v, or notes it as pending while it is masked. It
// does nothing while MSI-X is off or for a vector that does not exist.
func (m *MSIX) Trigger(v int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.enabled || v < 0 || v >= len(m.msis) {
		return nil
	}
	if m.maskedVector(v) {
		m.pba[v/8] |= 1 << (v % 8)
		return nil
	}
	return m.deliver(v)
}

// deliver routes what changed and signals vector v.
//
// Preconditions: mu is held; v is not masked.
func (m *MSIX) deliver(v int) error {
	if m.routed[v] != m.message(v) {
		if err := m.route(); err != nil {
			return err
		}
	}
	m.msis[v].Trigger()
	return nil
}

// route programs every unmasked message that differs from what is routed.
//
// Preconditions: mu is held.
func (m *MSIX) route() error {
	m.changedMSIs, m.changedMessages = m.changedMSIs[:0], m.changedMessages[:0]
	for v := range m.msis {
		if msg := m.message(v); !m.maskedVector(v) && msg != m.routed[v] {
			m.changedMSIs = append(m.changedMSIs, m.msis[v])
			m.changedMessages = append(m.changedMessages, msg)
		}
	}
	if err := m.alloc.RouteMSIs(m.changedMSIs, m.changedMessages); err != nil {
		return fmt.Errorf("pci: route %d MSI-X vectors: %w", len(m.changedMSIs), err)
	}
	for v := range m.msis {
		if !m.maskedVector(v) {
			m.routed[v] = m.message(v)
		}
	}
	return nil
}

// message is table entry v, as it is routed when it is not masked.
func (m *MSIX) message(v int) devices.MSIMessage {
	entry := m.table[v*msixEntrySize:]
	return devices.MSIMessage{
		Address: binary.LittleEndian.Uint64(entry),
		Data:    binary.LittleEndian.Uint32(entry[8:]),
	}
}

func (m *MSIX) maskedVector(v int) bool {
	return m.masked || m.table[v*msixEntrySize+12]&msixMasked != 0
}

// setControl follows the message control word of the capability.
func (m *MSIX) setControl(enabled, masked bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.enabled == enabled && m.masked == masked {
		return nil
	}
	m.enabled, m.masked = enabled, masked
	return m.flushPending()
}

// flushPending delivers the pending vectors that are not masked any more.
//
// Preconditions: mu is held.
func (m *MSIX) flushPending() error {
	if !m.enabled {
		return nil
	}
	for i, b := range m.pba {
		for bit := range 8 {
			v := i*8 + bit
			if b&(1<<bit) == 0 || m.maskedVector(v) {
				continue
			}
			m.pba[i] &^= 1 << bit
			if err := m.deliver(v); err != nil {
				return err
			}
		}
	}
	return nil
}

// pbaOffset is where the pending bits begin in the BAR: the table has the
// first half.
func (m *MSIX) pbaOffset() uint64 { return m.barSize() / 2 }

// barSize is a power of two with room for the table in its first half.
func (m *MSIX) barSize() uint64 {
	size := uint64(memory.PageSize)
	for size/2 < uint64(len(m.table)) {
		size *= 2
	}
	return size
}

// ReadRegister implements devices.Handler for the BAR of table and pending
// bits.
func (m *MSIX) ReadRegister(offset uint64, data []byte) {
	fill(data, 0)
	m.mu.Lock()
	defer m.mu.Unlock()
	if offset < m.pbaOffset() {
		copyFrom(data, m.table, offset)
		return
	}
	copyFrom(data, m.pba, offset-m.pbaOffset())
}

func copyFrom(dst, src []byte, offset uint64) {
	if offset < uint64(len(src)) {
		copy(dst, src[offset:])
	}
}

// WriteRegister implements devices.Handler. The pending bits are read-only.
func (m *MSIX) WriteRegister(offset uint64, data []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if offset >= uint64(len(m.table)) {
		return
	}
	n := copy(m.table[offset:], data)
	first, last := int(offset)/msixEntrySize, (int(offset)+n-1)/msixEntrySize
	for v := first; v <= last; v++ {
		// Reserved bits of the control word read as zeros.
		control := m.table[v*msixEntrySize+12:][:4]
		control[0] &= msixMasked
		control[1], control[2], control[3] = 0, 0, 0
	}
	// A failure to route shows again at the next Trigger, which reports it.
	_ = m.flushPending()
}

// AddMSIX gives the endpoint an MSI-X capability whose table and pending bits
// fill BAR i. The endpoint does not own m: whoever made it closes it.
func (e *Endpoint) AddMSIX(i int, m *MSIX) error {
	if err := e.AddBAR(i, BAR{Size: m.barSize(), Handler: m}); err != nil {
		return err
	}
	var body, writable [10]byte
	binary.LittleEndian.PutUint16(body[0:], uint16(m.Vectors()-1))
	binary.LittleEndian.PutUint32(body[2:], uint32(i))
	binary.LittleEndian.PutUint32(body[6:], uint32(m.pbaOffset())|uint32(i))
	binary.LittleEndian.PutUint16(writable[0:], msixEnable|msixMaskAll)
	offset, err := e.AddCapability(Capability{ID: capMSIX, Body: body[:], Writable: writable[:]})
	if err != nil {
		return err
	}
	e.msix, e.msixCap = m, offset
	return nil
}

// followMSIX tells MSI-X what its message control word says.
//
// Preconditions: mu is held.
func (e *Endpoint) followMSIX() {
	if e.msix == nil {
		return
	}
	control := binary.LittleEndian.Uint16(e.config[e.msixCap+2:])
	if err := e.msix.setControl(control&msixEnable != 0, control&msixMaskAll != 0); err != nil && e.bus != nil {
		e.bus.config.Log.Error("interrupt not delivered", "err", err)
	}
}
