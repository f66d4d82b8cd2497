package state

import (
	"errors"
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// ErrNewer is wrapped by the error for a section of a version that only a later
// ditto reads.
var ErrNewer = errors.New("saved by a newer ditto")

// Section is one part of a saved state.
type Section struct {
	Name    string
	Version uint32
	Bytes   []byte
}

// Error is a section that cannot be used.
type Error struct {
	Section string
	Err     error
}

// Error implements error.
func (e *Error) Error() string { return fmt.Sprintf("state section %q: %v", e.Section, e.Err) }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// MaxVCPUs bounds the vCPUs of a state.
const MaxVCPUs = 64

// maxSections is more than a full bus needs.
const maxSections = 64

// kind is what is known of the sections of a name: the version written, and the
// most bytes that one can have.
type kind struct {
	version uint32
	limit   int
}

const (
	smallLimit = 64 << 10
	// A vCPU takes 4 KiB for XSAVE, 1 KiB for the local APIC and 12 bytes for
	// each of some hundred MSRs.
	cpuLimit = smallLimit + MaxVCPUs*16<<10
)

// kindOf tells what a section is by its name; devices are numbered.
func kindOf(name string) (kind, bool) {
	switch name {
	case "machine", "irqchip", "clock", "platform", "pci":
		return kind{1, smallLimit}, true
	case "cpu":
		return kind{1, cpuLimit}, true
	}
	number := strings.TrimLeft(name, "abcdefghijklmnopqrstuvwxyz")
	if len(number) == 0 || len(number) > 2 || strings.Trim(number, "0123456789") != "" {
		return kind{}, false
	}
	switch strings.TrimSuffix(name, number) {
	case "blk", "net", "rng", "balloon", "console":
		return kind{1, smallLimit}, true
	}
	return kind{}, false
}

// Encode makes a section of the version that this ditto writes. The same message
// always gives the same bytes.
func Encode(name string, m proto.Message) (Section, error) {
	k, ok := kindOf(name)
	if !ok {
		return Section{}, &Error{name, errors.New("no such section")}
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return Section{}, &Error{name, err}
	}
	if len(b) > k.limit {
		return Section{}, &Error{name, fmt.Errorf("%d bytes are more than %d", len(b), k.limit)}
	}
	return Section{Name: name, Version: k.version, Bytes: b}, nil
}

// Decode reads a section of this version or the one before into m.
func Decode(s Section, m proto.Message) error {
	if err := s.check(); err != nil {
		return err
	}
	if err := proto.Unmarshal(s.Bytes, m); err != nil {
		return &Error{s.Name, errors.New("not a message of its kind")}
	}
	if field := unknownField(m.ProtoReflect()); field != "" {
		return &Error{s.Name, fmt.Errorf("%s has fields that are not known here", field)}
	}
	return nil
}

// check refuses what cannot be a section of this ditto.
func (s *Section) check() error {
	k, ok := kindOf(s.Name)
	if !ok {
		return &Error{s.Name, errors.New("not known here; it is of a newer ditto or of none")}
	}
	if err := s.fits(k); err != nil {
		return &Error{s.Name, err}
	}
	return nil
}

// fits checks version and size.
func (s *Section) fits(k kind) error {
	switch {
	case s.Version > k.version:
		return fmt.Errorf("version %d, this ditto reads up to %d: %w", s.Version, k.version, ErrNewer)
	case s.Version == 0 || s.Version+1 < k.version:
		return fmt.Errorf("version %d is too old, this ditto reads %d and the one before", s.Version, k.version)
	case len(s.Bytes) > k.limit:
		return fmt.Errorf("%d bytes are more than %d", len(s.Bytes), k.limit)
	}
	return nil
}

// unknownField returns the name of a message in m with fields that the schema
// does not have, or nothing.
func unknownField(m protoreflect.Message) (name string) {
	if len(m.GetUnknown()) > 0 {
		return string(m.Descriptor().Name())
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.Message() == nil:
		case f.IsList():
			for l, i := v.List(), 0; i < l.Len() && name == ""; i++ {
				name = unknownField(l.Get(i).Message())
			}
		default:
			name = unknownField(v.Message())
		}
		return name == ""
	})
	return name
}

// Set is the sections of one state by name.
type Set map[string]Section

// NewSet checks the names, versions and sizes of sections, each of which is there
// once.
func NewSet(sections []Section) (Set, error) {
	if len(sections) > maxSections {
		return nil, fmt.Errorf("state of %d sections, more than %d", len(sections), maxSections)
	}
	set := make(Set, len(sections))
	for _, s := range sections {
		if err := s.check(); err != nil {
			return nil, err
		}
		if _, twice := set[s.Name]; twice {
			return nil, &Error{s.Name, errors.New("is there twice")}
		}
		set[s.Name] = s
	}
	return set, nil
}

// Take decodes the section of a name into m and removes it from the set.
func (s Set) Take(name string, m proto.Message) error {
	section, ok := s[name]
	if !ok {
		return &Error{name, errors.New("is missing")}
	}
	delete(s, name)
	return Decode(section, m)
}

// Empty fails when a section was not taken.
func (s Set) Empty() error {
	for name := range s {
		return &Error{name, errors.New("belongs to nothing of this machine")}
	}
	return nil
}
