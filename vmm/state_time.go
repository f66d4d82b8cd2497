package vmm

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/vmm/kvm"
)

// A guest compares its clocks with each other. Linux gives up a time-stamp
// counter that leaves kvmclock or the power management timer by half a
// millisecond, so all of them are read as of one moment and set as of one moment,
// however long that takes:
//
//	save      kvmclock ---- at --.
//	          counters ---- at --+--> all as they were when kvmclock was read
//	          PM timer ---- at --'
//
//	restore   kvmclock := saved; read back: it was exactly that at "zero"
//	          counters := saved + what has passed since zero
//	          PM timer := saved + what has passed since zero

// stamped reads a clock, and tells when: halfway through the shortest of a few
// calls.
func stamped[T any](read func() (T, error)) (value T, at time.Time, err error) {
	shortest := time.Duration(math.MaxInt64)
	for range 5 {
		begin := time.Now()
		v, err := read()
		if err != nil {
			return v, begin, err
		}
		if took := time.Since(begin); took < shortest {
			shortest, value, at = took, v, begin.Add(took/2)
		}
	}
	return value, at, nil
}

// ticks is how often a counter of a frequency in kHz ticks in d, which may be
// negative.
func ticks(d time.Duration, khz uint64) uint64 {
	return uint64(int64(d.Seconds() * float64(khz) * 1000))
}

// captureTime reads the clocks. Those of the vCPUs, which were read before, and
// one by one, become what they were at the moment of the others.
func (m *VM) captureTime(ctx context.Context, cpus *cpuSection) (clock clockState, pmTimer uint32, err error) {
	c, at, err := stamped(m.kvm.Clock)
	if err != nil {
		return clockState{}, 0, err
	}
	clock = clockState{kvmclock: time.Duration(c.Clock), read: at.Round(0)}
	pmTimer = m.platform.timer.CounterAt(at)
	if cpus.tscKHz == 0 {
		return clock, pmTimer, nil // of a frequency that is not known nothing can be said
	}
	var first, firstOffset uint64
	for i, v := range m.vcpus {
		err := v.do(ctx, func() error {
			offset, err := v.kvm.TSCOffset()
			if i == 0 || err != nil {
				tsc, when, err := stamped(func() (uint64, error) { return readTSC(v.kvm) })
				first, firstOffset = tsc-ticks(when.Sub(at), cpus.tscKHz), offset
				cpus.vcpus[i].setTSC(first)
				return err
			}
			cpus.vcpus[i].setTSC(first + offset - firstOffset)
			return nil
		})
		if err != nil {
			return clockState{}, 0, fmt.Errorf("clock of vCPU %d: %w", i, err)
		}
	}
	return clock, pmTimer, nil
}

// readTSC reads a vCPU's time-stamp counter.
func readTSC(c *kvm.VCPU) (uint64, error) {
	msrs, err := c.MSRs([]uint32{msrTSC})
	if err != nil {
		return 0, err
	}
	if len(msrs) != 1 {
		return 0, errors.New("KVM does not tell the time-stamp counter")
	}
	return msrs[0].Value, nil
}

// onVCPU runs a function where a vCPU may be called.
type onVCPU func(c *vcpu, fn func() error) error

// setTime lets the clocks of a restored guest go on from where they were, or from
// some time later. It may be called again as long as the guest has not run.
func (m *VM) setTime(s *savedState, on onVCPU) error {
	later, ahead := s.passed()
	saved := s.clock.kvmclock + later
	if err := m.kvm.SetClock(kvm.Clock{Clock: uint64(saved)}); err != nil {
		return err
	}
	c, at, err := stamped(m.kvm.Clock)
	if err != nil {
		return err
	}
	zero := at.Add(saved - time.Duration(c.Clock))
	m.platform.timer.SetCounterAt(zero, s.platform.GetPmTimer(), later)
	var first, firstOffset uint64 // what the first vCPU's counter was, and is ahead by now
	for i, v := range m.vcpus {
		cpu := s.cpu.vcpus[i].after(ahead)
		err := on(v, func() error {
			switch offset, err := v.kvm.TSCOffset(); {
			case errors.Is(err, unix.ENXIO), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTTY), s.cpu.tscKHz == 0:
				// Before Linux 5.16: as near as it can.
				return setMSRs(v.kvm, cpu.timeMSRs(msrTSC, msrTSCDeadline))
			case err != nil:
				return err
			case i == 0:
				tsc, when, err := stamped(func() (uint64, error) { return readTSC(v.kvm) })
				if err != nil {
					return err
				}
				first = cpu.tsc()
				firstOffset = offset + first + ticks(when.Sub(zero), s.cpu.tscKHz) - tsc
			}
			if err := v.kvm.SetTSCOffset(firstOffset + cpu.tsc() - first); err != nil {
				return err
			}
			return setMSRs(v.kvm, cpu.timeMSRs(msrTSCDeadline))
		})
		if err != nil {
			return fmt.Errorf("clock of vCPU %d: %w", i, err)
		}
	}
	return nil
}
