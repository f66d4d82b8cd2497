package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"ditto.vm/devices"
	"ditto.vm/devices/debugexit"
	"ditto.vm/devices/ged"
	"ditto.vm/devices/i8042"
	"ditto.vm/devices/pmtimer"
	"ditto.vm/devices/pvpanic"
	"ditto.vm/devices/rtc"
	"ditto.vm/devices/serial"
	"ditto.vm/guest/acpi"
	"ditto.vm/memory"
)

// platform holds the devices that every machine has and that are not on PCI.
type platform struct {
	serial *serial.Device
	rtc    *rtc.Device
	timer  *pmtimer.Device
	ged    *ged.Device
}

// addPlatform makes the platform devices and puts them on the buses.
func (m *VM) addPlatform(console io.Writer) error {
	m.platform.serial = serial.New(serial.Config{Line: m.irqs.Line(gsiSerial), Output: console})
	m.cleanup.add(m.platform.serial.Close)
	m.platform.rtc = rtc.New(rtc.Config{Line: m.irqs.Line(gsiRTC), Now: time.Now})
	m.cleanup.add(m.platform.rtc.Close)
	m.platform.timer = pmtimer.New()
	var err error
	m.platform.ged, err = ged.New(ged.Config{
		Line:         m.irqs.Line(gsiGED),
		Memory:       m.mem,
		GenerationID: vmGenIDBase,
		OnPowerOff:   func() { m.request(requestPowerOff) },
		OnReset:      func() { m.request(requestReset) },
	})
	if err != nil {
		return fmt.Errorf("event device: %w", err)
	}
	panicked := pvpanic.New(func(e pvpanic.Event) {
		switch {
		case e&pvpanic.CrashLoaded != 0:
			m.log.Warn("the guest's kernel panicked and saves a crash dump")
		case e&pvpanic.Panicked != 0:
			m.request(requestPanicked)
		}
	})
	for _, p := range []struct {
		bus        *devices.Bus
		base, size uint64
		handler    devices.Handler
	}{
		{&m.ports, serial.COM1, serial.Size, m.platform.serial},
		{&m.ports, rtc.Port, rtc.Size, m.platform.rtc},
		{&m.ports, pvpanic.Port, pvpanic.Size, panicked},
		{&m.ports, pmtimer.Port, pmtimer.Size, m.platform.timer},
		{&m.ports, i8042.Port, i8042.Size, i8042.New(func() { m.request(requestReset) })},
		{&m.mmio, uint64(gedBase), ged.Size, m.platform.ged},
	} {
		if err := p.bus.Add(p.base, p.size, p.handler); err != nil {
			return err
		}
	}
	if m.source.program == nil {
		return nil
	}
	// A payload has no ACPI: it ends by writing its status to a port.
	exit := debugexit.New(func(status uint32) {
		go m.end(Exit{Reason: ExitStatus, Status: status})
	})
	return m.ports.Add(debugexit.Port, debugexit.Size, exit)
}

// reset brings the platform devices back to power-on.
func (p *platform) reset() error {
	p.serial.Reset()
	p.rtc.Reset()
	return p.ged.Reset()
}

// drain waits, for a bounded time, until the console has taken what the guest
// wrote last.
func (p *platform) drain() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if err := p.serial.Flush(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("console: %w", err)
	}
	return nil
}

// acpiConfig describes the machine to its guest.
func (m *VM) acpiConfig() acpi.Config {
	ids := make([]uint32, len(m.vcpus))
	for i := range ids {
		ids[i] = uint32(i)
	}
	return acpi.Config{
		Area:        memory.Range{Start: acpiBase, Size: acpiSize},
		APICIDs:     ids,
		LocalAPIC:   lapicBase,
		IOAPIC:      ioapicBase,
		Overrides:   []acpi.Override{{Source: 0, GSI: 2}},
		ECAM:        memory.Range{Start: ecamBase, Size: ecamSize},
		PCIWindow32: memory.Range{Start: pciWindowBase, Size: pciWindowSize},
		Power: acpi.Power{
			GSI:          gsiGED,
			Events:       gedBase + ged.RegEvents,
			SleepControl: gedBase + ged.RegSleepControl,
			SleepStatus:  gedBase + ged.RegSleepStatus,
			Reset:        gedBase + ged.RegReset,
			ResetValue:   ged.ResetValue,
			PowerButton:  ged.EventPowerButton,
			VMGenID:      ged.EventVMGenID,
		},
		Serial:  []acpi.ISADevice{{Port: serial.COM1, GSI: gsiSerial}},
		RTC:     acpi.ISADevice{Port: rtc.Port, GSI: gsiRTC},
		VMGenID: vmGenIDBase,
		PVPanic: pvpanic.Port,
		PMTimer: pmtimer.Port,
	}
}
