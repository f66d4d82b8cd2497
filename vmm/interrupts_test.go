package vmm

import (
	"log/slog"
	"testing"

	"ditto.vm/devices"
	"ditto.vm/vmm/kvm"
)

// bareVM is a KVM VM with interrupt controllers and nothing else.
func bareVM(t *testing.T) *kvm.VM {
	t.Helper()
	requireKVM(t)
	s, err := kvm.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	vm, err := s.CreateVM()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = vm.Close() })
	if err := vm.CreateIRQChip(); err != nil {
		t.Fatal(err)
	}
	return vm
}

func TestMSIsAreGivenBack(t *testing.T) {
	i := newInterrupts(bareVM(t), slog.New(slog.DiscardHandler))
	if err := i.installPins(); err != nil {
		t.Fatal(err)
	}
	fds := countFDs(t)
	for range 3 {
		msis, err := i.AllocateMSIs(8)
		if err != nil {
			t.Fatal(err)
		}
		messages := make([]devices.MSIMessage, len(msis))
		for n := range messages {
			messages[n] = devices.MSIMessage{Address: 0xfee00000, Data: uint32(0x30 + n)}
		}
		if err := i.RouteMSIs(msis, messages); err != nil {
			t.Fatal(err)
		}
		if len(i.routes) != 8 {
			t.Errorf("%d routes, want 8", len(i.routes))
		}
		messages[3].Masked = true
		if err := i.RouteMSIs(msis[3:4], messages[3:4]); err != nil {
			t.Fatal(err)
		}
		if _, routed := i.routes[msis[3].(*msi).gsi]; routed || len(i.routes) != 7 {
			t.Errorf("a masked message keeps its route: %v", i.routes)
		}
		msis[0].Trigger()
		i.FreeMSIs(msis)
	}
	if len(i.routes) != 0 || i.next != ioapicPins+8 {
		t.Errorf("%d routes left, next GSI %d: want 0 and reuse", len(i.routes), i.next)
	}
	if got := countFDs(t); got != fds {
		t.Errorf("%d descriptors, %d before", got, fds)
	}
	if err := i.RouteMSIs(nil, make([]devices.MSIMessage, 1)); err == nil {
		t.Error("a message without an interrupt was accepted")
	}
}

func TestMSILimit(t *testing.T) {
	i := newInterrupts(bareVM(t), slog.New(slog.DiscardHandler))
	i.next = gsiLimit - 1
	msis, err := i.AllocateMSIs(1)
	if err != nil {
		t.Fatal(err)
	}
	fds := countFDs(t)
	if _, err := i.AllocateMSIs(1); err == nil {
		t.Error("an interrupt beyond the limit was allocated")
	}
	if got := countFDs(t); got != fds {
		t.Errorf("%d descriptors after the failure, %d before", got, fds)
	}
	i.FreeMSIs(msis)
}
