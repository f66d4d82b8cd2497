package i8042

import (
	"bytes"
	"testing"
)

func TestOnlyTheResetCommandResets(t *testing.T) {
	resets := 0
	d := New(func() { resets++ })
	for command := range 256 {
		d.WriteRegister(0, []byte{byte(command)})
		if want := command >= CommandReset; (resets > 0) != want {
			t.Fatalf("%d resets after command %#x", resets, command)
		}
	}
	d.WriteRegister(0, []byte{CommandReset, CommandReset})
	if resets != 1 {
		t.Errorf("%d resets, want 1", resets)
	}
	status := []byte{0xff}
	d.ReadRegister(0, status)
	if status[0] != 0 {
		t.Errorf("status %#x, want not busy", status[0])
	}
}

func TestResetVector(t *testing.T) {
	code := ResetVector()
	if len(code) > 16 {
		t.Errorf("%d bytes do not fit below 1 MiB", len(code))
	}
	if !bytes.Contains(code, []byte{0xb0, 0xfe, 0xe6, 0x64}) {
		t.Errorf("code % x does not pulse the reset line", code)
	}
}
