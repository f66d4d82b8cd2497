package wire

import (
	"encoding/hex"
	"fmt"
)

// Token names a migration: 16 random bytes, drawn by the source.
type Token [16]byte

// String returns hexadecimal digits.
func (t Token) String() string { return fmt.Sprintf("%x", t[:]) }

// MarshalText implements encoding.TextMarshaler.
func (t Token) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// Outcome is what became of a migration.
type Outcome uint8

// The outcomes. The zero value is no answer.
const (
	OutcomeUnknown   Outcome = iota // not known to whom was asked
	OutcomePending                  // not decided yet
	OutcomeCommitted                // the VM is the destination's
	OutcomeNever                    // the VM never ran at the destination, and never will
	outcomes
)

var outcomeNames = [outcomes]string{"unknown", "pending", "committed", "never"}

// String returns the outcome's name.
func (o Outcome) String() string {
	if o >= outcomes {
		return fmt.Sprintf("outcome %d", uint8(o))
	}
	return outcomeNames[o]
}

// MarshalText implements encoding.TextMarshaler.
func (o Outcome) MarshalText() ([]byte, error) { return []byte(o.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (o *Outcome) UnmarshalText(text []byte) error {
	for i, name := range outcomeNames {
		if string(text) == name {
			*o = Outcome(i)
			return nil
		}
	}
	return fmt.Errorf("no such outcome: %q", text)
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (t *Token) UnmarshalText(text []byte) error {
	var read Token
	if len(text) != 2*len(read) {
		return fmt.Errorf("a token has %d hexadecimal digits, not %d", 2*len(read), len(text))
	}
	if _, err := hex.Decode(read[:], text); err != nil {
		return fmt.Errorf("token: %w", err)
	}
	*t = read
	return nil
}
