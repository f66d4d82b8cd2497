package state

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

func TestSectionVersions(t *testing.T) {
	s, err := Encode("clock", &Clock{KvmclockNs: 7})
	if err != nil {
		t.Fatal(err)
	}
	current := s.Version
	for _, tt := range []struct {
		name    string
		version uint32
		newer   bool
		want    string // "" when it is read
	}{
		{"clock", current, false, ""},
		{"clock", current + 1, true, `"clock": version 2`},
		{"clock", 1 << 31, true, `"clock": version`},
		{"clock", 0, false, "too old"},
		{"clocks", current, false, `"clocks": not known`},
		{"blk", current, false, "not known"},
		{"blk100", current, false, "not known"},
		{"blk1x", current, false, "not known"},
		{"gpu0", current, false, "not known"},
		{"", current, false, "not known"},
		{"0", current, false, "not known"},
	} {
		s.Name, s.Version = tt.name, tt.version
		var c Clock
		err := Decode(s, &c)
		if _, set := NewSet([]Section{s}); (set == nil) != (err == nil) {
			t.Errorf("%+v: a set says %v", tt, set)
		}
		if tt.want == "" {
			if err != nil || c.KvmclockNs != 7 {
				t.Errorf("%+v: %v, %v", tt, &c, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), tt.want) || errors.Is(err, ErrNewer) != tt.newer {
			t.Errorf("%+v: %v", tt, err)
		}
	}
}

// TestPreviousVersion: of a section whose version has counted up, the one before
// is read and older ones are not.
func TestPreviousVersion(t *testing.T) {
	for version, want := range map[uint32]bool{0: false, 1: false, 2: true, 3: true, 4: false} {
		s := Section{Name: "clock", Version: version}
		if err := s.fits(kind{version: 3, limit: 1}); (err == nil) != want {
			t.Errorf("version %d where 3 is written: %v", version, err)
		}
	}
}

func TestSectionBounds(t *testing.T) {
	if _, err := Encode("console0", &Console{Input: make([]byte, smallLimit)}); err == nil {
		t.Error("a section is written that is not read")
	}
	large := Section{Name: "console0", Version: 1, Bytes: make([]byte, smallLimit+1)}
	if err := Decode(large, &Console{}); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("a large section: %v", err)
	}
	if _, err := NewSet(make([]Section, maxSections+1)); err == nil {
		t.Error("a state of very many sections is read")
	}
	if _, err := Encode("gpu0", &Console{}); err == nil {
		t.Error("a section of a name that is not read is written")
	}
}

// TestUnknownFields: what a later ditto added and this one would lose is refused,
// however deep.
func TestUnknownFields(t *testing.T) {
	extra := protowire.AppendVarint(protowire.AppendTag(nil, 999, protowire.VarintType), 1)
	top, _ := proto.Marshal(&Virtio{DeviceId: 2})
	vcpu := &VCPU{}
	vcpu.ProtoReflect().SetUnknown(extra)
	inList, _ := proto.Marshal(&CPU{Vcpus: []*VCPU{{}, vcpu}})
	serial := &Serial{}
	serial.ProtoReflect().SetUnknown(extra)
	inMessage, _ := proto.Marshal(&Platform{Serial: serial})
	for _, tt := range []struct {
		name  string
		bytes []byte
		into  proto.Message
		want  string
	}{
		{"blk0", append(bytes.Clone(top), extra...), &Virtio{}, "Virtio has fields"},
		{"cpu", inList, &CPU{}, "VCPU has fields"},
		{"platform", inMessage, &Platform{}, "Serial has fields"},
		{"blk0", []byte{0xff}, &Virtio{}, "not a message"},
	} {
		err := Decode(Section{Name: tt.name, Version: 1, Bytes: tt.bytes}, tt.into)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

func TestSet(t *testing.T) {
	clock, err := Encode("clock", &Clock{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewSet([]Section{clock, clock}); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("a section twice: %v", err)
	}
	set, err := NewSet([]Section{clock})
	if err != nil {
		t.Fatal(err)
	}
	var named *Error
	if err := set.Empty(); !errors.As(err, &named) || named.Section != "clock" {
		t.Errorf("a section that nobody took: %v", err)
	}
	if err := set.Take("pci", &PCI{}); !errors.As(err, &named) || named.Section != "pci" {
		t.Errorf("a section that is not there: %v", err)
	}
	if err := errors.Join(set.Take("clock", &Clock{}), set.Empty()); err != nil {
		t.Error(err)
	}
}
