package config

import (
	"encoding/json"
	"fmt"
	"math/bits"
	"strconv"
	"strings"
	"time"
)

// Bytes is a size in bytes. In text it takes the binary units K, M, G and T,
// also written KiB or KB: 512M, 2GiB, 1048576.
type Bytes uint64

// ParseBytes reads a size such as 512M or 2GiB.
func ParseBytes(s string) (Bytes, error) {
	digits := strings.TrimRight(s, "KMGTBkmgtib")
	value, err := strconv.ParseUint(digits, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is not a size: write a number and K, M, G or T, as in 512M", s)
	}
	var shift uint
	switch strings.ToUpper(s[len(digits):]) {
	case "", "B":
	case "K", "KB", "KIB":
		shift = 10
	case "M", "MB", "MIB":
		shift = 20
	case "G", "GB", "GIB":
		shift = 30
	case "T", "TB", "TIB":
		shift = 40
	default:
		return 0, fmt.Errorf("%q has an unknown unit: use K, M, G or T, as in 512M", s)
	}
	if bits.Len64(value)+int(shift) > 64 {
		return 0, fmt.Errorf("%q is larger than any machine", s)
	}
	return Bytes(value << shift), nil
}

// String returns the size in the largest unit that is exact.
func (b Bytes) String() string {
	units := [...]string{"", "KiB", "MiB", "GiB", "TiB"}
	unit := 0
	for b != 0 && b%1024 == 0 && unit < len(units)-1 {
		b /= 1024
		unit++
	}
	return strconv.FormatUint(uint64(b), 10) + units[unit]
}

// MarshalText implements encoding.TextMarshaler.
func (b Bytes) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (b *Bytes) UnmarshalText(text []byte) (err error) {
	*b, err = ParseBytes(string(text))
	return err
}

// UnmarshalJSON accepts a number of bytes or a string with a unit.
func (b *Bytes) UnmarshalJSON(data []byte) error {
	var s string
	if json.Unmarshal(data, &s) != nil {
		s = string(data)
	}
	return b.UnmarshalText([]byte(s))
}

// Duration is a time.Duration whose text form is that of time.ParseDuration.
type Duration time.Duration

// String returns the duration as 1m30s.
func (d Duration) String() string { return time.Duration(d).String() }

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(text []byte) error {
	parsed, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("%q is not a duration: write a number and a unit, as in 10s", text)
	}
	*d = Duration(parsed)
	return nil
}
