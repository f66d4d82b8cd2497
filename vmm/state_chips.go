package vmm

import (
	"errors"
	"fmt"
	"math"
	"time"

	"ditto.vm/migration/state"
	"ditto.vm/vmm/kvm"
)

// chipState is what KVM keeps of a VM's interrupt controllers and timer.
type chipState struct {
	chips []kvm.IRQChip // in the order of chipIDs
	pit   kvm.PIT
}

// chipIDs are the interrupt controllers of a VM.
func chipIDs() []uint32 { return []uint32{kvm.ChipPICMaster, kvm.ChipPICSlave, kvm.ChipIOAPIC} }

// captureChips reads them.
func captureChips(vm *kvm.VM) (*chipState, error) {
	var s chipState
	for _, id := range chipIDs() {
		chip, err := vm.IRQChip(id)
		if err != nil {
			return nil, err
		}
		s.chips = append(s.chips, chip)
	}
	var err error
	s.pit, err = vm.PIT()
	return &s, err
}

// apply restores them.
func (s *chipState) apply(vm *kvm.VM) error {
	for _, chip := range s.chips {
		if err := vm.SetIRQChip(chip); err != nil {
			return err
		}
	}
	return vm.SetPIT(s.pit)
}

// message writes the section "irqchip" down.
func (s *chipState) message() (*state.IRQChip, error) {
	var p packer
	return &state.IRQChip{
		PicMaster: trimZeros(s.chips[0].Chip[:]),
		PicSlave:  trimZeros(s.chips[1].Chip[:]),
		Ioapic:    trimZeros(s.chips[2].Chip[:]),
		Pit:       p.pack(s.pit),
	}, p.err
}

// decodeChips reads a section "irqchip".
func decodeChips(x *state.IRQChip) (*chipState, error) {
	var s chipState
	for i, b := range [][]byte{x.GetPicMaster(), x.GetPicSlave(), x.GetIoapic()} {
		chip := kvm.IRQChip{ChipID: chipIDs()[i]}
		if len(b) > len(chip.Chip) {
			return nil, fmt.Errorf("%d bytes of an interrupt controller, more than %d", len(b), len(chip.Chip))
		}
		copy(chip.Chip[:], b)
		s.chips = append(s.chips, chip)
	}
	var p packer
	p.unpack("timer", x.GetPit(), &s.pit)
	return &s, p.err
}

// clockState is kvmclock and when it was read.
type clockState struct {
	kvmclock time.Duration // since the guest started
	read     time.Time
}

// since is how much time has passed since the clock was read.
func (s clockState) since() time.Duration { return max(time.Now().Round(0).Sub(s.read), 0) }

// message writes the section "clock" down.
func (s clockState) message() *state.Clock {
	return &state.Clock{KvmclockNs: uint64(s.kvmclock), RealtimeNs: uint64(s.read.UnixNano())}
}

// decodeClock reads a section "clock".
func decodeClock(x *state.Clock) (clockState, error) {
	// Half of what a Duration holds leaves room to advance it.
	const limit = math.MaxInt64 / 2
	if x.GetKvmclockNs() > limit || x.GetRealtimeNs() > math.MaxInt64 {
		return clockState{}, errors.New("a time that no guest reaches")
	}
	return clockState{
		kvmclock: time.Duration(x.GetKvmclockNs()),
		read:     time.Unix(0, int64(x.GetRealtimeNs())),
	}, nil
}
