package net

import (
	"encoding/binary"
	"errors"
	"fmt"

	"ditto.vm/devices/virtio"
)

// Classes and commands of the control queue (virtio 1.2 5.1.6.5).
const (
	classRX       = 0
	classMAC      = 1
	classVLAN     = 2
	classAnnounce = 3
	classOffloads = 5

	commandMACTable    = 0
	commandMACSet      = 1
	commandVLANAdd     = 0
	commandVLANDelete  = 1
	commandAnnounceAck = 0
	commandOffloadsSet = 0
)

// Commands of the RX class, each followed by one byte: on or off.
const (
	modePromiscuous = iota
	modeAllMulticast
	modeAllUnicast
	modeNoMulticast
	modeNoUnicast
	modeNoBroadcast
	numModes
)

// Answers.
const (
	controlOK    = 0
	controlError = 1
)

// maxControl bounds a command in bytes: address tables of more than a thousand
// entries.
const maxControl = 8 << 10

// errControl is wrapped by every command that is refused.
var errControl = errors.New("control command refused")

// command is a decoded command of the control queue. Which fields are set
// depends on class and code.
type command struct {
	class, code        uint8
	on                 bool
	mac                MAC
	vid                uint16
	offloads           uint64
	unicast, multicast []byte // addresses, a multiple of six bytes each
}

// parseCommand decodes and validates a command. The result refers to p.
func parseCommand(p []byte) (command, error) {
	if len(p) < 2 {
		return command{}, fmt.Errorf("%w: %d bytes", errControl, len(p))
	}
	c := command{class: p[0], code: p[1]}
	p = p[2:]
	ok := false
	switch {
	case c.class == classRX && c.code < numModes:
		if ok = len(p) == 1 && p[0] <= 1; ok {
			c.on = p[0] == 1
		}
	case c.class == classMAC && c.code == commandMACTable:
		var rest []byte
		if c.unicast, rest, ok = parseTable(p); ok {
			c.multicast, rest, ok = parseTable(rest)
			ok = ok && len(rest) == 0
		}
	case c.class == classMAC && c.code == commandMACSet:
		if ok = len(p) == len(MAC{}); ok {
			c.mac = MAC(p)
		}
	case c.class == classVLAN && (c.code == commandVLANAdd || c.code == commandVLANDelete):
		if ok = len(p) == 2; ok {
			c.vid = binary.LittleEndian.Uint16(p)
			ok = c.vid < maxVLAN
		}
	case c.class == classAnnounce && c.code == commandAnnounceAck:
		ok = len(p) == 0
	case c.class == classOffloads && c.code == commandOffloadsSet:
		if ok = len(p) == 8; ok {
			c.offloads = binary.LittleEndian.Uint64(p)
		}
	}
	if !ok {
		return command{}, fmt.Errorf("%w: class %d, command %d, %d bytes", errControl, c.class, c.code, len(p))
	}
	return c, nil
}

// parseTable takes one struct virtio_net_ctrl_mac off p: a count and as many
// addresses.
func parseTable(p []byte) (macs, rest []byte, ok bool) {
	if len(p) < 4 {
		return nil, nil, false
	}
	n := uint64(binary.LittleEndian.Uint32(p)) * uint64(len(MAC{}))
	p = p[4:]
	if n > uint64(len(p)) {
		return nil, nil, false
	}
	return p[:n], p[n:], true
}

// serveControl answers the commands on the control queue.
func (r *receiver) serveControl() {
	for range virtio.Budget {
		if !r.control.Pop(&r.chain) {
			r.control.Publish()
			return
		}
		n, err := r.answer(&r.chain)
		if err != nil {
			r.run.NeedsReset(err)
		}
		r.control.Push(r.chain.Head, n)
	}
	r.control.Publish()
	r.control.Again()
}

// answer runs one command and returns how many bytes of answer it wrote. Only
// a command without room for the answer is an error.
func (r *receiver) answer(c *virtio.Chain) (uint32, error) {
	if c.WritableBytes == 0 {
		return 0, fmt.Errorf("%w: no room for the answer", errControl)
	}
	ack := byte(controlOK)
	if err := r.obey(c); err != nil {
		r.run.Log.Debug("network control command", "err", err)
		ack = controlError
	}
	return uint32(c.WriteAt([]byte{ack}, 0)), nil
}

// obey decodes one command and carries it out.
func (r *receiver) obey(c *virtio.Chain) error {
	if c.ReadableBytes > maxControl {
		return fmt.Errorf("%w: %d bytes", errControl, c.ReadableBytes)
	}
	cmd, err := parseCommand(r.command[:c.ReadAt(r.command[:], 0)])
	if err != nil {
		return err
	}
	d := r.run.device
	switch cmd.class {
	case classRX:
		d.filter.modes[cmd.code] = cmd.on
	case classVLAN:
		d.filter.setVLAN(cmd.vid, cmd.code == commandVLANAdd)
	case classAnnounce:
		d.announced()
	case classOffloads:
		return r.setOffloads(cmd.offloads)
	case classMAC:
		if cmd.code == commandMACTable {
			d.filter.setTables(cmd.unicast, cmd.multicast)
			return nil
		}
		if cmd.mac.multicast() || cmd.mac == (MAC{}) {
			return fmt.Errorf("%w: %x is no unicast address", errControl, cmd.mac)
		}
		d.setMAC(cmd.mac)
	}
	return nil
}

// setOffloads switches the guest's offloads, which must have been negotiated.
func (r *receiver) setOffloads(want uint64) error {
	if unknown := want &^ (r.run.Features & guestOffloads); unknown != 0 {
		return fmt.Errorf("%w: offloads %#x were not negotiated", errControl, unknown)
	}
	if err := r.run.backend.SetOffloads(want); err != nil {
		return err
	}
	r.run.device.offloads = want
	r.setLimit()
	return nil
}
