package vmm

import (
	"context"
	"fmt"
	"time"

	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
)

// ConsoleInput feeds p to the guest's console. It blocks while the guest does
// not read, until ctx is done.
func (m *VM) ConsoleInput(ctx context.Context, p []byte) (int, error) {
	if m.pci.console != nil {
		return m.pci.console.WriteInput(ctx, p)
	}
	return m.platform.serial.WriteInput(ctx, p)
}

// ConsoleResize tells the guest the size of the terminal, where the console has
// a way to.
func (m *VM) ConsoleResize(cols, rows uint16) {
	if m.pci.console != nil {
		m.pci.console.Resize(cols, rows)
	}
}

// Balloon reads the balloon's target and what the guest makes of it.
func (m *VM) Balloon() (api.Balloon, error) {
	b := m.pci.balloon
	if b == nil {
		return api.Balloon{}, fmt.Errorf("no balloon: %w", api.ErrNotSupported)
	}
	stats := b.Stats()
	return api.Balloon{TargetBytes: b.Target(), ActualBytes: b.Actual(), Guest: stats.Named()}, nil
}

// SetBalloon asks the guest to give up bytes of its memory.
func (m *VM) SetBalloon(bytes uint64) error {
	switch {
	case m.pci.balloon == nil:
		return fmt.Errorf("no balloon: %w", api.ErrNotSupported)
	case bytes > m.mem.Size():
		return fmt.Errorf("balloon of %d bytes in a guest of %d bytes of memory", bytes, m.mem.Size())
	}
	m.pci.balloon.SetTarget(bytes)
	return nil
}

// Forwards lists the host ports that lead into the guest.
func (m *VM) Forwards() []api.Forward {
	forwards := []api.Forward{}
	for _, n := range m.cfg.Nets {
		if n.Mode != config.NetUser {
			continue
		}
		for _, f := range n.Forwards {
			forwards = append(forwards, api.Forward{
				Listen: f.Listen(), GuestPort: f.GuestPort, Protocol: api.ForwardProtocol(f.Protocol),
			})
		}
	}
	return forwards
}

// pressInterval is how often [VM.Stop] presses the power button: a guest that is
// still booting has no driver for it and misses a press.
const pressInterval = 5 * time.Second

// Stop presses the power button, again from time to time, and kills the guest
// when it has not ended within grace. It returns when the guest has ended.
func (m *VM) Stop(ctx context.Context, grace time.Duration) error {
	timer := time.NewTimer(grace)
	defer timer.Stop()
	again := time.NewTicker(pressInterval)
	defer again.Stop()
	for waiting := true; waiting; {
		if err := m.PowerButton(); err != nil {
			break // a paused guest hears nothing
		}
		select {
		case <-m.ended:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-again.C:
		case <-timer.C:
			m.log.Warn("the guest did not power off in time and is killed", "dur", grace)
			waiting = false
		}
	}
	if err := m.decided(ctx); err != nil {
		return err
	}
	m.end(Exit{Reason: ExitKilled})
	select {
	case <-m.ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
