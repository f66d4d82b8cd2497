package state

import (
	"bytes"
	"encoding/binary"
	"time"

	"ditto.vm/devices/pci"
	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/balloon"
	"ditto.vm/devices/virtio/blk"
	"ditto.vm/devices/virtio/console"
	"ditto.vm/devices/virtio/net"
	"ditto.vm/memory"
)

// NewVirtio writes down a virtio function without what its type adds.
func NewVirtio(id virtio.ID, s virtio.PCIState) *Virtio {
	x := &Virtio{
		DeviceId: uint32(id), Config: s.Endpoint.Config[:],
		Status:              uint32(s.Status),
		DeviceFeatureSelect: s.DeviceFeatureSelect, DriverFeatureSelect: s.DriverFeatureSelect,
		DriverFeatures: s.DriverFeatures,
		QueueSelect:    uint32(s.QueueSelect), ConfigVector: uint32(s.ConfigVector),
		Isr: uint32(s.ISR), Generation: uint32(s.Generation),
	}
	if m := s.Endpoint.MSIX; m != nil {
		x.MsixTable, x.MsixPending = m.Table, m.Pending
	}
	for _, q := range s.Queues {
		x.Queues = append(x.Queues, &Queue{
			Size: uint32(q.Size), Desc: uint64(q.Desc), Avail: uint64(q.Avail), Used: uint64(q.Used),
			NextAvail: uint32(q.NextAvail), NextUsed: uint32(q.NextUsed),
			Enabled: q.Enabled, Vector: uint32(q.Vector),
		})
	}
	return x
}

// State returns what a function of type id is given.
func (x *Virtio) State(id virtio.ID) (virtio.PCIState, error) {
	var n narrow
	if x.GetDeviceId() != uint32(id) {
		n.failed("is of a virtio device of type %d, want %d", x.GetDeviceId(), id)
	}
	s := virtio.PCIState{
		Status:              n.u8("status", x.GetStatus()),
		DeviceFeatureSelect: x.GetDeviceFeatureSelect(), DriverFeatureSelect: x.GetDriverFeatureSelect(),
		DriverFeatures: x.GetDriverFeatures(),
		QueueSelect:    n.u16("queue select", x.GetQueueSelect()),
		ConfigVector:   n.u16("configuration vector", x.GetConfigVector()),
		ISR:            n.u8("ISR", x.GetIsr()), Generation: n.u8("generation", x.GetGeneration()),
	}
	n.fill("configuration space", s.Endpoint.Config[:], x.GetConfig())
	s.Endpoint.MSIX = &pci.MSIXState{Table: x.GetMsixTable(), Pending: x.GetMsixPending()}
	if len(x.GetQueues()) > virtio.MaxQueues {
		n.failed("%d queues, more than %d", len(x.GetQueues()), virtio.MaxQueues)
		return s, n.err
	}
	for _, q := range x.GetQueues() {
		s.Queues = append(s.Queues, virtio.QueueState{
			QueueConfig: virtio.QueueConfig{
				Size: n.u16("queue size", q.GetSize()),
				Desc: memory.GPA(q.GetDesc()), Avail: memory.GPA(q.GetAvail()), Used: memory.GPA(q.GetUsed()),
				NextAvail: n.u16("next available", q.GetNextAvail()), NextUsed: n.u16("next used", q.GetNextUsed()),
			},
			Enabled: q.GetEnabled(), Vector: n.u16("vector", q.GetVector()),
		})
	}
	return s, n.err
}

// NewBlock writes down what a disk adds, with its sizes as the guest knows them,
// in bytes.
func NewBlock(s blk.State, size int64, blockSize int) *Block {
	return &Block{Writeback: s.Writeback, Size: uint64(size), BlockSize: uint32(blockSize)}
}

// State returns what a disk is given.
func (x *Block) State() blk.State { return blk.State{Writeback: x.GetWriteback()} }

// NewNet writes down what a network device adds.
func NewNet(s net.State) *Net {
	x := &Net{
		Mac: s.MAC[:], Offloads: s.Offloads, Announce: s.Announce,
		UnicastFull: s.UnicastFull, MulticastFull: s.MulticastFull,
	}
	for i, on := range s.Modes {
		if on {
			x.Modes |= 1 << i
		}
	}
	for _, mac := range s.Unicast {
		x.Unicast = append(x.Unicast, mac[:]...)
	}
	for _, mac := range s.Multicast {
		x.Multicast = append(x.Multicast, mac[:]...)
	}
	var vlans []byte
	for _, word := range s.VLANs {
		vlans = binary.LittleEndian.AppendUint64(vlans, word)
	}
	x.Vlans = bytes.TrimRight(vlans, "\x00")
	return x
}

// State returns what a network device is given.
func (x *Net) State() (net.State, error) {
	var n narrow
	s := net.State{
		Offloads: x.GetOffloads(), Announce: x.GetAnnounce(),
		UnicastFull: x.GetUnicastFull(), MulticastFull: x.GetMulticastFull(),
	}
	n.fill("MAC", s.MAC[:], x.GetMac())
	if x.GetModes()>>len(s.Modes) != 0 {
		n.failed("receive modes %#x", x.GetModes())
	}
	for i := range s.Modes {
		s.Modes[i] = x.GetModes()&(1<<i) != 0
	}
	s.Unicast, s.Multicast = n.macs(x.GetUnicast()), n.macs(x.GetMulticast())
	vlans := make([]byte, 8*len(s.VLANs))
	if len(x.GetVlans()) > len(vlans) {
		n.failed("%d bytes of VLANs, more than %d", len(x.GetVlans()), len(vlans))
	}
	copy(vlans, x.GetVlans())
	for i := range s.VLANs {
		s.VLANs[i] = binary.LittleEndian.Uint64(vlans[8*i:])
	}
	return s, n.err
}

// macs cuts addresses out of b.
func (n *narrow) macs(b []byte) []net.MAC {
	const size = len(net.MAC{})
	if len(b)%size != 0 {
		n.failed("%d bytes of addresses", len(b))
	}
	var macs []net.MAC
	for ; len(b) >= size; b = b[size:] {
		macs = append(macs, net.MAC(b[:size]))
	}
	return macs
}

// NewBalloon writes down what the balloon adds.
func NewBalloon(s balloon.State) *Balloon {
	return &Balloon{TargetPages: s.TargetPages, ActualPages: s.ActualPages, StatsIntervalNs: int64(s.StatsInterval)}
}

// State returns what the balloon is given.
func (x *Balloon) State() balloon.State {
	return balloon.State{
		TargetPages: x.GetTargetPages(), ActualPages: x.GetActualPages(),
		StatsInterval: time.Duration(x.GetStatsIntervalNs()),
	}
}

// NewConsole writes down what the console adds.
func NewConsole(s console.State) *Console {
	return &Console{Cols: uint32(s.Cols), Rows: uint32(s.Rows), Input: s.Input}
}

// State returns what the console is given.
func (x *Console) State() (console.State, error) {
	var n narrow
	s := console.State{Cols: n.u16("columns", x.GetCols()), Rows: n.u16("rows", x.GetRows()), Input: x.GetInput()}
	return s, n.err
}
