package vmm

import (
	"encoding/binary"
	"testing"

	"ditto.vm/devices/ged"
	"ditto.vm/migration/state"
)

// What a guest does with the line of the event device, as the registers of the
// interrupt controllers have it.
const (
	eventVector   = 0x61
	ioapicEntries = 24      // in struct kvm_ioapic_state
	ioapicLevel   = 1 << 15 // of an entry
	ioapicMasked  = 1 << 16
	lapicSpurious = 0xf0
	lapicEnabled  = 1 << 8
	lapicRequests = 0x200
)

// TestRestoreInterrupts: an event that is due after a restore interrupts the guest,
// whether the restore makes it or it was not seen before the save, and waits while
// the guest has masked its line.
func TestRestoreInterrupts(t *testing.T) {
	for _, tt := range []struct {
		name         string
		press, renew bool
		entry        uint64
		events       uint32
		interrupted  bool
	}{
		{"nothing", false, false, ioapicLevel, 0, false},
		{"a new generation", false, true, ioapicLevel, ged.EventVMGenID, true},
		{"the button before the save", true, false, ioapicLevel, ged.EventPowerButton, true},
		{"both", true, true, ioapicLevel, ged.EventPowerButton | ged.EventVMGenID, true},
		{"both, masked", true, true, ioapicLevel | ioapicMasked, ged.EventPowerButton | ged.EventVMGenID, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := payloadConfig("spin")
			m := newVM(t, c, newConsole())
			ctx := deadline(t)
			if err := m.Start(ctx); err != nil {
				t.Fatal(err)
			}
			if tt.press {
				if err := m.PowerButton(); err != nil {
					t.Fatal(err)
				}
			}
			if err := m.Pause(ctx); err != nil {
				t.Fatal(err)
			}
			sections := saveOf(t, m)
			var chips state.IRQChip
			alter(t, sections, "irqchip", &chips, func() {
				chips.Ioapic = append(chips.Ioapic, make([]byte, 512-len(chips.Ioapic))...)
				binary.LittleEndian.PutUint64(chips.Ioapic[ioapicEntries+8*gsiGED:], tt.entry|eventVector)
			})
			var cpu state.CPU
			alter(t, sections, "cpu", &cpu, func() {
				binary.LittleEndian.PutUint32(cpu.Vcpus[0].Lapic[lapicSpurious:], lapicEnabled|0xff)
			})
			r, err := Restore(ctx, c, sections, copyOf(m.mem), RestoreOptions{Options: quiet(), NewGenerationID: tt.renew})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if got := r.platform.ged.State().Events; got != tt.events {
				t.Errorf("events %#x, want %#x", got, tt.events)
			}
			if got, err := r.requested(t, eventVector); err != nil || got != tt.interrupted {
				t.Errorf("interrupted %t, want %t, %v", got, tt.interrupted, err)
			}
			// The line is up for when the guest unmasks it or ends its interrupt.
			chip, err := r.kvm.IRQChip(chipIDs()[2])
			if err != nil {
				t.Fatal(err)
			}
			const requests = 16 // in struct kvm_ioapic_state
			up := binary.LittleEndian.Uint32(chip.Chip[requests:])&(1<<gsiGED) != 0
			if up != (tt.events != 0) {
				t.Errorf("the line is up: %t", up)
			}
		})
	}
}

// requested tells whether the first vCPU's local APIC holds an interrupt request.
func (m *VM) requested(t *testing.T, vector int) (set bool, err error) {
	err = m.vcpus[0].do(t.Context(), func() error {
		lapic, err := m.vcpus[0].kvm.LAPIC()
		set = lapic.Regs[lapicRequests+vector/32*0x10+vector%32/8]>>(vector%8)&1 != 0
		return err
	})
	return set, err
}
