package main

import (
	"encoding/base64"
	"fmt"
	"net/netip"
	"path"
	"strconv"
	"strings"
	"time"
)

// config is what the kernel command line asks of this program.
type config struct {
	run        string // command line for the shell; "" means none was given
	after      action // what follows the command
	hostname   string
	nets       []netSpec
	netWait    time.Duration
	mountAuto  bool
	mounts     []mountSpec
	modules    []string
	shell      string
	term       string
	winsize    winsize
	stopGrace  time.Duration
	root       rootSpec
	complaints []string // one line per word that was wrong
}

// winsize is the size of a terminal in characters.
type winsize struct{ cols, rows uint16 }

// netSpec configures one interface, or every Ethernet interface when iface is
// empty (the first one only for a static address).
type netSpec struct {
	iface   string
	mode    netMode
	addr    netip.Prefix
	gateway netip.Addr // invalid when there is none
	dns     []netip.Addr
}

type netMode uint8

const (
	netDHCP netMode = iota + 1
	netOff
	netStatic
)

// mountSpec mounts source (a device path, a bare device name or LABEL=...) on dir.
type mountSpec struct {
	source   string
	dir      string
	readOnly bool
}

// rootSpec is the root file system to switch to; none when source is empty.
type rootSpec struct {
	source   string
	fsType   string
	flags    string
	init     string
	readOnly bool
}

const (
	defaultNetWait   = 10 * time.Second
	defaultStopGrace = 3 * time.Second
	maxDuration      = time.Hour
)

func defaultConfig() config {
	return config{
		after:     actPowerOff,
		hostname:  "ditto",
		netWait:   defaultNetWait,
		mountAuto: true,
		term:      "screen", // like a console, it may have several terminals or none
		winsize:   winsize{80, 24},
		stopGrace: defaultStopGrace,
		root:      rootSpec{init: "/sbin/init"},
	}
}

// word is one parameter of the kernel command line. hasValue tells "x=" from "x".
type word struct {
	key, value string
	hasValue   bool
}

// splitCmdline splits a kernel command line as the kernel's next_arg does:
// blanks separate, double quotes protect blanks, and the quotes around a whole
// word or around its value are dropped. It stops at "--".
func splitCmdline(line string) []word {
	var words []word
	for {
		line = strings.TrimLeft(line, " \t\n\r\v\f")
		if line == "" {
			return words
		}
		var raw string
		raw, line = nextRaw(line)
		if raw == "--" {
			return words
		}
		words = append(words, parseWord(raw))
	}
}

// nextRaw cuts the first word, quotes included, from a line that does not
// start with a blank.
func nextRaw(line string) (raw, rest string) {
	inQuote := false
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == '"':
			inQuote = !inQuote
		case !inQuote && strings.IndexByte(" \t\n\r\v\f", c) >= 0:
			return line[:i], line[i:]
		}
	}
	return line, ""
}

func parseWord(raw string) word {
	if strings.HasPrefix(raw, `"`) {
		raw = strings.TrimSuffix(raw[1:], `"`)
	}
	key, value, ok := strings.Cut(raw, "=")
	if strings.HasPrefix(value, `"`) {
		value = strings.TrimSuffix(value[1:], `"`)
	}
	return word{key: key, value: value, hasValue: ok}
}

// parseConfig reads what concerns this program from a kernel command line. It
// never fails: wrong words are listed in complaints and their defaults stay.
func parseConfig(line string) config {
	c := defaultConfig()
	for _, w := range splitCmdline(line) {
		if err := c.apply(w); err != nil {
			c.complaints = append(c.complaints, fmt.Sprintf("%s=%s: %v", w.key, w.value, err))
		}
	}
	return c
}

func (c *config) apply(w word) error {
	name, ours := strings.CutPrefix(w.key, "ditto.")
	if !ours {
		return c.applyRoot(w)
	}
	if !w.hasValue || w.value == "" {
		return fmt.Errorf("needs a value")
	}
	var err error
	switch name {
	case "run":
		c.run = w.value
	case "run64":
		var run string
		if run, err = decodeBase64(w.value); err == nil {
			c.run = run
		}
	case "after":
		var a action
		if a, err = parseAction(w.value); err == nil {
			c.after = a
		}
	case "hostname":
		err = setHostname(&c.hostname, w.value)
	case "net":
		var s netSpec
		if s, err = parseNet(w.value); err == nil {
			c.nets = append(c.nets, s)
		}
	case "netwait":
		err = setDuration(&c.netWait, w.value)
	case "mount":
		err = c.applyMount(w.value)
	case "modules":
		c.modules = append(c.modules, splitList(w.value)...)
	case "shell":
		err = setAbs(&c.shell, w.value)
	case "term":
		c.term = w.value
	case "winsize":
		err = setWinsize(&c.winsize, w.value)
	case "stop":
		err = setDuration(&c.stopGrace, w.value)
	default:
		err = fmt.Errorf("unknown option")
	}
	return err
}

// applyRoot takes the kernel's own words about the root file system.
func (c *config) applyRoot(w word) error {
	switch w.key {
	case "root":
		c.root.source = w.value
	case "rootfstype":
		c.root.fsType = w.value
	case "rootflags":
		c.root.flags = w.value
	case "init":
		return setAbs(&c.root.init, w.value)
	case "ro":
		c.root.readOnly = true
	case "rw":
		c.root.readOnly = false
	}
	return nil
}

func (c *config) applyMount(v string) error {
	switch v {
	case "off":
		c.mountAuto = false
		return nil
	case "auto":
		c.mountAuto = true
		return nil
	}
	parts := strings.Split(v, ",")
	if len(parts) < 2 || len(parts) > 3 || parts[0] == "" {
		return fmt.Errorf("want off, auto or SOURCE,DIR[,ro]")
	}
	m := mountSpec{source: parts[0]}
	if err := setAbs(&m.dir, parts[1]); err != nil {
		return err
	}
	if len(parts) == 3 {
		if parts[2] != "ro" && parts[2] != "rw" {
			return fmt.Errorf("want ro or rw, not %q", parts[2])
		}
		m.readOnly = parts[2] == "ro"
	}
	c.mounts = append(c.mounts, m)
	return nil
}

// parseNet reads [IFACE,]{off|dhcp|ADDR/PREFIX[,GATEWAY[,DNS...]]}.
func parseNet(v string) (netSpec, error) {
	parts := strings.Split(v, ",")
	var s netSpec
	if !isNetMode(parts[0]) {
		s.iface, parts = parts[0], parts[1:]
		if s.iface == "" || len(s.iface) > 15 || strings.ContainsAny(s.iface, "/ ") || len(parts) == 0 {
			return s, fmt.Errorf("want [IFACE,]{off|dhcp|ADDR/PREFIX[,GATEWAY[,DNS...]]}")
		}
	}
	switch parts[0] {
	case "off", "dhcp":
		if len(parts) > 1 {
			return s, fmt.Errorf("nothing may follow %s", parts[0])
		}
		s.mode = netDHCP
		if parts[0] == "off" {
			s.mode = netOff
		}
		return s, nil
	}
	addr, err := netip.ParsePrefix(parts[0])
	if err != nil {
		return s, err
	}
	s.mode, s.addr = netStatic, addr
	for i, p := range parts[1:] {
		if p == "" && i == 0 {
			continue // no gateway, but a name server
		}
		ip, err := netip.ParseAddr(p)
		if err != nil {
			return s, err
		}
		if i > 0 {
			s.dns = append(s.dns, ip)
			continue
		}
		if ip.Is4() != addr.Addr().Is4() {
			return s, fmt.Errorf("gateway %s is of another family than %s", ip, addr)
		}
		s.gateway = ip
	}
	return s, nil
}

func isNetMode(s string) bool {
	if s == "off" || s == "dhcp" {
		return true
	}
	_, err := netip.ParsePrefix(s)
	return err == nil
}

func decodeBase64(v string) (string, error) {
	v = strings.TrimRight(v, "=")
	enc := base64.RawStdEncoding
	if strings.ContainsAny(v, "-_") {
		enc = base64.RawURLEncoding
	}
	b, err := enc.DecodeString(v)
	return string(b), err
}

func setDuration(dst *time.Duration, v string) error {
	d, err := time.ParseDuration(v)
	if err != nil {
		return err
	}
	if d < 0 || d > maxDuration {
		return fmt.Errorf("want 0s to %s", maxDuration)
	}
	*dst = d
	return nil
}

func setAbs(dst *string, v string) error {
	if !path.IsAbs(v) || strings.ContainsRune(v, 0) {
		return fmt.Errorf("want an absolute path")
	}
	*dst = path.Clean(v)
	return nil
}

func setHostname(dst *string, v string) error {
	if len(v) > 64 || strings.ContainsAny(v, " \t\n\x00/") {
		return fmt.Errorf("not a host name")
	}
	*dst = v
	return nil
}

func setWinsize(dst *winsize, v string) error {
	c, r, ok := strings.Cut(v, "x")
	cols, err1 := strconv.ParseUint(c, 10, 16)
	rows, err2 := strconv.ParseUint(r, 10, 16)
	if !ok || err1 != nil || err2 != nil || cols == 0 || rows == 0 {
		return fmt.Errorf("want COLSxROWS, such as 80x24")
	}
	*dst = winsize{cols: uint16(cols), rows: uint16(rows)}
	return nil
}

// splitList splits at commas and drops empty parts.
func splitList(v string) []string {
	return strings.FieldsFunc(v, func(r rune) bool { return r == ',' })
}
