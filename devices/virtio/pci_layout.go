package virtio

import (
	"encoding/binary"

	"ditto.vm/devices/pci"
)

// BARs of the function: one for the registers, one for MSI-X.
const (
	registerBAR = 0
	msixBAR     = 1
)

// Where the structures of virtio 1.2 4.1.4 lie in the register BAR, a page
// each.
const (
	commonOffset = 0x0000
	isrOffset    = 0x1000
	deviceOffset = 0x2000
	notifyOffset = 0x3000
	barSize      = 0x4000
	regionSize   = 0x1000
)

// notifyStride is notify_off_multiplier: each queue has an address, and so an
// eventfd, of its own.
const notifyStride = 4

// MaxQueues is how many queues one device may have: their notify addresses
// share a page.
const MaxQueues = regionSize / notifyStride

// Capability types (virtio 1.2 4.1.4).
const (
	capVendor = 0x09

	cfgCommon = 1
	cfgNotify = 2
	cfgISR    = 3
	cfgDevice = 4
	cfgPCI    = 5
)

// Offsets in struct virtio_pci_cap, which starts with the capability's ID.
const (
	capBAR     = 4
	capOffset  = 8
	capLength  = 12
	capData    = 16 // pci_cfg_data of virtio_pci_cfg_cap
	capBodyOff = 2  // the pci package adds ID and next
)

// addCapabilities lists the structures for the driver to find.
func (d *PCIDevice) addCapabilities() error {
	for _, c := range []struct {
		kind   byte
		offset uint32
		extra  []byte
	}{
		{cfgCommon, commonOffset, nil},
		{cfgNotify, notifyOffset, []byte{notifyStride, 0, 0, 0}},
		{cfgISR, isrOffset, nil},
		{cfgDevice, deviceOffset, nil},
	} {
		body := capabilityBody(c.kind, c.offset, regionSize, c.extra)
		if _, err := d.endpoint.AddCapability(pci.Capability{ID: capVendor, Body: body}); err != nil {
			return err
		}
	}
	return d.addWindow()
}

// capabilityBody is struct virtio_pci_cap without its first two bytes:
// cap_len, cfg_type, bar, id, two of padding, le32 offset, le32 length.
func capabilityBody(kind byte, offset, length uint32, extra []byte) []byte {
	body := make([]byte, capData-capBodyOff, capData-capBodyOff+len(extra))
	body[0] = byte(capData + len(extra))
	body[1] = kind
	body[capBAR-capBodyOff] = registerBAR
	binary.LittleEndian.PutUint32(body[capOffset-capBodyOff:], offset)
	binary.LittleEndian.PutUint32(body[capLength-capBodyOff:], length)
	return append(body, extra...)
}

// addWindow adds VIRTIO_PCI_CAP_PCI_CFG (virtio 1.2 4.1.4.9): a way to the
// BAR through configuration space, for firmware that cannot reach the BAR.
func (d *PCIDevice) addWindow() error {
	body := capabilityBody(cfgPCI, 0, 0, make([]byte, 4))
	writable := make([]byte, len(body))
	writable[capBAR-capBodyOff] = 0xFF
	for i := capOffset - capBodyOff; i < len(body); i++ {
		writable[i] = 0xFF
	}
	var start int
	touchesData := func(offset, n int) bool { return offset < capData+4 && offset+n > capData }
	start, err := d.endpoint.AddCapability(pci.Capability{
		ID: capVendor, Body: body, Writable: writable,
		BeforeRead: func(offset, n int) {
			if touchesData(offset, n) {
				d.windowRead(start)
			}
		},
		AfterWrite: func(offset, n int) {
			if touchesData(offset, n) {
				d.windowWrite(start)
			}
		},
	})
	return err
}

// window reads where the PCI_CFG capability points. ok is false for what the
// driver must not ask for: another BAR, a width other than 1, 2 or 4, an
// offset that is not a multiple of it, or one outside the BAR.
func (d *PCIDevice) window(start int) (offset uint64, data []byte, ok bool) {
	raw := make([]byte, capData+4)
	d.endpoint.Bytes(start, raw)
	at := binary.LittleEndian.Uint32(raw[capOffset:])
	n := binary.LittleEndian.Uint32(raw[capLength:])
	if raw[capBAR] != registerBAR || (n != 1 && n != 2 && n != 4) || at%n != 0 || at >= barSize {
		return 0, nil, false
	}
	return uint64(at), raw[capData:][:n], true
}

func (d *PCIDevice) windowRead(start int) {
	if offset, data, ok := d.window(start); ok {
		barHandler{d}.ReadRegister(offset, data)
		d.endpoint.SetBytes(start+capData, data)
	}
}

func (d *PCIDevice) windowWrite(start int) {
	if offset, data, ok := d.window(start); ok {
		barHandler{d}.WriteRegister(offset, data)
	}
}

// barHandler answers accesses to the register BAR.
type barHandler struct{ d *PCIDevice }

// ReadRegister implements devices.Handler.
func (h barHandler) ReadRegister(offset uint64, data []byte) {
	for i := range data {
		data[i] = 0
	}
	in := offset % regionSize
	switch offset - in {
	case commonOffset:
		h.d.readCommon(in, data)
	case isrOffset:
		// Reading clears, even when only a part is asked for.
		if in == 0 && len(data) > 0 {
			data[0] = byte(h.d.isr.Swap(0))
		}
	case deviceOffset:
		h.d.dev.ReadConfig(in, data)
	}
}

// WriteRegister implements devices.Handler. A notification comes this way only
// when its doorbell is not connected.
func (h barHandler) WriteRegister(offset uint64, data []byte) {
	in := offset % regionSize
	switch offset - in {
	case commonOffset:
		h.d.writeCommon(in, data)
	case deviceOffset:
		h.d.dev.WriteConfig(in, data)
	case notifyOffset:
		if i := int(in / notifyStride); in%notifyStride == 0 && i < len(h.d.kicks) {
			signal(h.d.kicks[i])
		}
	}
}
