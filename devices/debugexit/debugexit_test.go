package debugexit

import (
	"bytes"
	"testing"
)

func TestExit(t *testing.T) {
	for _, test := range []struct {
		offset uint64
		data   []byte
		want   []uint32
	}{
		{0, []byte{7}, []uint32{7}},
		{0, []byte{0x78, 0x56}, []uint32{0x5678}},
		{0, []byte{0x78, 0x56, 0x34, 0x12}, []uint32{0x12345678}},
		{1, []byte{7}, nil},
		{0, make([]byte, 8), nil},
	} {
		var got []uint32
		New(func(status uint32) { got = append(got, status) }).WriteRegister(test.offset, test.data)
		if len(got) != len(test.want) || len(got) > 0 && got[0] != test.want[0] {
			t.Errorf("% x at %d: %v, want %v", test.data, test.offset, got, test.want)
		}
	}
	v := []byte{1, 2, 3, 4}
	if New(nil).ReadRegister(0, v); !bytes.Equal(v, make([]byte, 4)) {
		t.Errorf("read % x", v)
	}
}
