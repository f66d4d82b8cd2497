package state

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"ditto.vm/devices/pci"
	"ditto.vm/devices/virtio"
)

// addSeeds gives a fuzz target an empty section, a whole one and each half of it.
func addSeeds(f *testing.F, m proto.Message) {
	b, err := proto.Marshal(m)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte{})
	f.Add(b)
	f.Add(b[:len(b)/2])
	f.Add(b[len(b)/2:])
}

// again checks that a message which was read is read again as the same.
func again(t *testing.T, name string, m, fresh proto.Message) {
	t.Helper()
	s, err := Encode(name, m)
	if err != nil {
		t.Fatal(err)
	}
	if err := Decode(s, fresh); err != nil || !proto.Equal(m, fresh) {
		t.Errorf("%v is read again as %v, %v", m, fresh, err)
	}
}

// FuzzPlatform reads sections of the platform's devices.
func FuzzPlatform(f *testing.F) {
	addSeeds(f, &Platform{
		Serial: &Serial{Ier: 1, Received: []byte("ab"), Breaks: []byte{0, 1}, Divisor: 12},
		Rtc:    &RTC{Ram: make([]byte, 128), Set: make([]byte, 11), OffsetNs: -5},
		Events: &Events{Pending: 1, GenerationId: make([]byte, 16)}, PmTimer: 99,
	})
	f.Fuzz(func(t *testing.T, data []byte) {
		var p Platform
		if Decode(Section{"platform", 1, data}, &p) != nil {
			return
		}
		again(t, "platform", &p, &Platform{})
		if s, err := p.GetSerial().State(); err == nil && len(s.Breaks) != len(p.GetSerial().GetBreaks()) {
			t.Errorf("%d breaks of %d", len(s.Breaks), len(p.GetSerial().GetBreaks()))
		}
		_, _ = p.GetRtc().State()
		_, _ = p.GetEvents().State()
	})
}

// FuzzPCI reads sections of the bus.
func FuzzPCI(f *testing.F) {
	addSeeds(f, &PCI{Address: 0x80000000, BridgeConfig: make([]byte, pci.ConfigSize)})
	f.Fuzz(func(t *testing.T, data []byte) {
		var p PCI
		if Decode(Section{"pci", 1, data}, &p) != nil {
			return
		}
		again(t, "pci", &p, &PCI{})
		_, _ = p.State()
	})
}

// FuzzVirtio reads sections of virtio devices.
func FuzzVirtio(f *testing.F) {
	base := Virtio{
		DeviceId: 1, Config: make([]byte, pci.ConfigSize), MsixTable: make([]byte, 64), MsixPending: make([]byte, 8),
		Status: 15, DriverFeatures: 1 << 32, Queues: []*Queue{{Size: 256, Desc: 4096, Avail: 8192, Used: 12288, Enabled: true}},
	}
	for _, own := range []isVirtio_Device{
		nil,
		&Virtio_Block{&Block{Writeback: true, Size: 1 << 30, BlockSize: 512}},
		&Virtio_Net{&Net{Mac: []byte{2, 0, 0, 0, 0, 1}, Unicast: make([]byte, 12), Vlans: []byte{1}, Modes: 1}},
		&Virtio_Balloon{&Balloon{TargetPages: 3, ActualPages: 2, StatsIntervalNs: 1}},
		&Virtio_Console{&Console{Cols: 80, Rows: 25, Input: []byte("x")}},
	} {
		base.Device = own
		addSeeds(f, &base)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var v Virtio
		if Decode(Section{"net0", 1, data}, &v) != nil {
			return
		}
		again(t, "net0", &v, &Virtio{})
		if s, err := v.State(virtio.IDNet); err == nil && len(s.Queues) > virtio.MaxQueues {
			t.Errorf("%d queues", len(s.Queues))
		}
		_ = v.GetBlock().State()
		_ = v.GetBalloon().State()
		_, _ = v.GetNet().State()
		_, _ = v.GetConsole().State()
	})
}
