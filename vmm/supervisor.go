package vmm

import (
	"context"
	"fmt"

	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
)

// supervise serves requests until the guest ends. It is the only goroutine that
// resets the machine or takes it down.
func (m *VM) supervise() {
	for r := range m.requests {
		e := m.serve(r)
		if e == nil {
			continue
		}
		m.teardown(*e)
		return
	}
}

// serve returns how the guest ends, or nil when it goes on.
func (m *VM) serve(r request) *Exit {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.endReason != nil {
		return m.endReason
	}
	switch r {
	case requestPowerOff:
		return &Exit{Reason: ExitPowerOff}
	case requestPanicked:
		m.log.Error("the guest's kernel panicked; its console says why")
		return &Exit{Reason: ExitPanicked}
	case requestReset:
		if limit := m.cfg.RebootLimit; m.cfg.OnReboot == config.RebootStop || limit > 0 && m.resets >= limit {
			return &Exit{Reason: ExitReboot}
		}
		if err := m.restart(); err != nil {
			return &Exit{Reason: ExitFailed, Err: fmt.Errorf("restart the guest: %w", err)}
		}
	}
	return nil
}

// teardown stops everything that runs and wakes those who wait.
func (m *VM) teardown(e Exit) {
	m.mu.Lock()
	m.stopBackground()
	for _, c := range m.vcpus {
		c.stop()
	}
	m.pci.stop()
	if err := m.platform.drain(); err != nil {
		m.log.Warn("console output may be incomplete", "err", err)
	}
	m.state = api.Stopped
	m.exit = e
	m.mu.Unlock()
	m.log.Info("guest ended", "reason", e.Reason)
	close(m.ended)
}

// restart brings the machine back to power-on and boots again: vCPUs and
// interrupt controllers first, so that nothing runs while memory is emptied.
// Preconditions: mu is held.
func (m *VM) restart() error {
	ctx := context.Background()
	m.stopBackground()
	if err := m.pauseVCPUs(ctx); err != nil {
		return err
	}
	m.resetDue.Store(false)
	if err := m.pci.reset(); err != nil {
		return err
	}
	if m.restored != nil {
		m.restored.restart()
	}
	// Memory before the platform, which puts the generation ID there.
	if err := m.mem.Clear(); err != nil {
		return err
	}
	if err := m.platform.reset(); err != nil {
		return err
	}
	if err := m.reset0.applyVM(m.kvm); err != nil {
		return err
	}
	for i, c := range m.vcpus {
		if err := c.do(ctx, func() error { return m.reset0.cpus[i].apply(c.kvm) }); err != nil {
			return fmt.Errorf("reset vCPU %d: %w", i, err)
		}
	}
	if err := m.load(); err != nil {
		return err
	}
	m.resets++
	m.log.Info("guest restarted", "restarts", m.resets)
	if m.state == api.Paused {
		if m.naming != nil {
			m.nameLoaded()()
		}
		return nil // the user's pause outlives the restart
	}
	m.startBackground()
	return m.resumeVCPUs(ctx)
}
