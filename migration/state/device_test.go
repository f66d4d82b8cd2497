package state

import (
	"bytes"
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/proto"

	"ditto.vm/devices/ged"
	"ditto.vm/devices/pci"
	"ditto.vm/devices/rtc"
	"ditto.vm/devices/serial"
	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/balloon"
	"ditto.vm/devices/virtio/blk"
	"ditto.vm/devices/virtio/console"
	"ditto.vm/devices/virtio/net"
)

// fillRandom sets every field below v, so that one which is not written down is
// found without being named.
func fillRandom(r *rand.Rand, v reflect.Value) {
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(r.Uint64()&1 != 0)
	case reflect.Int64:
		v.SetInt(int64(r.Uint64()))
	case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(r.Uint64() >> (64 - v.Type().Bits()))
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fillRandom(r, v.Elem())
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 5, 5))
		fallthrough
	case reflect.Array:
		for i := range v.Len() {
			fillRandom(r, v.Index(i))
		}
	case reflect.Struct:
		for i := range v.NumField() {
			fillRandom(r, v.Field(i))
		}
	default:
		panic("a field of kind " + v.Kind().String())
	}
}

// carry encodes and decodes a message.
func carry[M proto.Message](t *testing.T, name string, from, to M) M {
	t.Helper()
	s, err := Encode(name, from)
	if err == nil {
		err = Decode(s, to)
	}
	if err != nil {
		t.Fatal(err)
	}
	return to
}

// TestEveryFieldIsCarried: each field of each device's state survives the way
// through a section.
func TestEveryFieldIsCarried(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		var p struct {
			Serial serial.State
			RTC    rtc.State
			Events ged.State
			PCI    pci.State
		}
		fillRandom(r, reflect.ValueOf(&p).Elem())
		p.PCI.Bridge.MSIX = nil // a bridge has none
		platform := carry(t, "platform", &Platform{
			Serial: NewSerial(p.Serial), Rtc: NewRTC(p.RTC), Events: NewEvents(p.Events),
		}, &Platform{})
		expect(t, p.Serial)(platform.Serial.State())
		expect(t, p.RTC)(platform.Rtc.State())
		expect(t, p.Events)(platform.Events.State())
		expect(t, p.PCI)(carry(t, "pci", NewPCI(p.PCI), &PCI{}).State())

		var v struct {
			PCI     virtio.PCIState
			Block   blk.State
			Net     net.State
			Balloon balloon.State
			Console console.State
		}
		fillRandom(r, reflect.ValueOf(&v).Elem())
		expect(t, v.PCI)(carry(t, "rng0", NewVirtio(4, v.PCI), &Virtio{}).State(4))
		block := NewBlock(v.Block, 1<<40, 4096)
		expect(t, v.Block)(block.State(), nil)
		if block.Size != 1<<40 || block.BlockSize != 4096 {
			t.Errorf("block sizes %d, %d", block.Size, block.BlockSize)
		}
		expect(t, v.Net)(NewNet(v.Net).State())
		expect(t, v.Balloon)(NewBalloon(v.Balloon).State(), nil)
		expect(t, v.Console)(NewConsole(v.Console).State())
	}
}

// expect returns what compares a result with want.
func expect[S any](t *testing.T, want S) func(S, error) {
	t.Helper()
	return func(got S, err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		} else if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("-saved +restored:\n%s", diff)
		}
	}
}

// TestWideNumbers: what does not fit into a register is refused and not cut off.
func TestWideNumbers(t *testing.T) {
	config := make([]byte, pci.ConfigSize)
	mac := []byte{2, 0, 0, 0, 0, 1}
	for name, try := range map[string]func() error{
		"serial register": func() error { _, err := (&Serial{Ier: 256}).State(); return err },
		"serial divisor":  func() error { _, err := (&Serial{Divisor: 1 << 16}).State(); return err },
		"serial break":    func() error { _, err := (&Serial{Breaks: []byte{2}}).State(); return err },
		"RTC memory":      func() error { _, err := (&RTC{}).State(); return err },
		"generation ID":   func() error { _, err := (&Events{GenerationId: config}).State(); return err },
		"bridge":          func() error { _, err := (&PCI{}).State(); return err },
		"virtio status":   func() error { _, err := (&Virtio{Config: config, Status: 256}).State(0); return err },
		"virtio type":     func() error { _, err := (&Virtio{Config: config, DeviceId: 1}).State(2); return err },
		"virtio queue": func() error {
			_, err := (&Virtio{Config: config, Queues: []*Queue{{Size: 1 << 16}}}).State(0)
			return err
		},
		"virtio queues": func() error {
			_, err := (&Virtio{Config: config, Queues: make([]*Queue, virtio.MaxQueues+1)}).State(0)
			return err
		},
		"MAC":            func() error { _, err := (&Net{Mac: mac[1:]}).State(); return err },
		"modes":          func() error { _, err := (&Net{Mac: mac, Modes: 1 << 31}).State(); return err },
		"addresses":      func() error { _, err := (&Net{Mac: mac, Unicast: mac[1:]}).State(); return err },
		"VLANs":          func() error { _, err := (&Net{Mac: mac, Vlans: make([]byte, 513)}).State(); return err },
		"columns":        func() error { _, err := (&Console{Cols: 1 << 16}).State(); return err },
		"nothing at all": func() error { _, err := (*Net)(nil).State(); return err },
	} {
		if try() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestSameBytes: the same state is written in the same way.
func TestSameBytes(t *testing.T) {
	a, errA := Encode("cpu", &CPU{Vcpus: []*VCPU{{MsrIndices: []uint32{1, 2}, MsrValues: []uint64{3, 4}}}})
	b, errB := Encode("cpu", &CPU{Vcpus: []*VCPU{{MsrIndices: []uint32{1, 2}, MsrValues: []uint64{3, 4}}}})
	if errA != nil || errB != nil || !bytes.Equal(a.Bytes, b.Bytes) {
		t.Errorf("%x, %v and %x, %v", a.Bytes, errA, b.Bytes, errB)
	}
}
