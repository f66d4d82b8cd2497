package config

import (
	"encoding/json"
	"fmt"
	"strings"

	"ditto.vm/memory"
)

// OnOff is a switch. In text it is on or off; true, false, yes and no are
// understood too, because YAML reads a bare on or off as a boolean.
type OnOff bool

// String returns on or off.
func (o OnOff) String() string {
	if o {
		return "on"
	}
	return "off"
}

// MarshalText implements encoding.TextMarshaler.
func (o OnOff) MarshalText() ([]byte, error) { return []byte(o.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (o *OnOff) UnmarshalText(text []byte) error {
	switch strings.ToLower(string(text)) {
	case "on", "true", "yes":
		*o = true
	case "off", "false", "no":
		*o = false
	default:
		return fmt.Errorf("%q is neither on nor off", text)
	}
	return nil
}

// UnmarshalJSON accepts a boolean or a string.
func (o *OnOff) UnmarshalJSON(data []byte) error {
	var b bool
	if json.Unmarshal(data, &b) == nil {
		*o = OnOff(b)
		return nil
	}
	var s string
	if err := json.Unmarshal(data, &s); err != nil {
		return fmt.Errorf("%s is neither on nor off", data)
	}
	return o.UnmarshalText([]byte(s))
}

// enumText and enumParse give the small enumerations below their text form.
func enumText[T ~int](names []string, v T) string {
	if v < 0 || int(v) >= len(names) {
		return fmt.Sprintf("invalid(%d)", int(v))
	}
	return names[v]
}

func enumParse[T ~int](names []string, what string, text []byte, v *T) error {
	for i, name := range names {
		if strings.EqualFold(string(text), name) {
			*v = T(i)
			return nil
		}
	}
	return fmt.Errorf("unknown %s %q: use %s", what, text, orList(names))
}

// orList joins words as "a, b or c".
func orList(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

// Console is the kind of device behind the guest's console.
type Console int

// The console devices. The zero value is the serial port, which every kernel
// can print on from its first line.
const (
	ConsoleSerial Console = iota
	ConsoleVirtio
)

func consoleNames() []string { return []string{"serial", "virtio"} }

// String returns serial or virtio.
func (c Console) String() string { return enumText(consoleNames(), c) }

// MarshalText implements encoding.TextMarshaler.
func (c Console) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *Console) UnmarshalText(text []byte) error {
	return enumParse(consoleNames(), "console", text, c)
}

// RebootPolicy is what happens when the guest reboots itself.
type RebootPolicy int

// The reboot policies.
const (
	// RebootRestart resets the machine and boots it again.
	RebootRestart RebootPolicy = iota
	// RebootStop ends the machine, as a power-off would.
	RebootStop
)

func rebootNames() []string { return []string{"restart", "stop"} }

// String returns restart or stop.
func (p RebootPolicy) String() string { return enumText(rebootNames(), p) }

// MarshalText implements encoding.TextMarshaler.
func (p RebootPolicy) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (p *RebootPolicy) UnmarshalText(text []byte) error {
	return enumParse(rebootNames(), "reboot policy", text, p)
}

// TrackerNames lists the values of --tracker.
func TrackerNames() []string {
	var names []string
	for kind := memory.TrackerAuto; kind <= memory.TrackerNone; kind++ {
		names = append(names, kind.String())
	}
	return names
}

// NetMode is what a network device is connected to.
type NetMode int

// The network modes.
const (
	// NetUser is the rootless user-mode network: NAT, DHCP, DNS, forwards.
	NetUser NetMode = iota
	// NetTap is a tap device, on a bridge if one is named.
	NetTap
	// NetSocket is a stream socket with length-prefixed frames.
	NetSocket
	// NetNone is no network; the entry is dropped.
	NetNone
)

func netModeNames() []string { return []string{"user", "tap", "socket", "none"} }

// String returns user, tap, socket or none.
func (m NetMode) String() string { return enumText(netModeNames(), m) }

// MarshalText implements encoding.TextMarshaler.
func (m NetMode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *NetMode) UnmarshalText(text []byte) error {
	return enumParse(netModeNames(), "network", text, m)
}
