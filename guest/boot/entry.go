package boot

import "fmt"

// Mode is the operating mode in which a vCPU starts.
type Mode int

// The modes. The zero value is not a mode.
const (
	// ModeLong64 is 64-bit long mode with paging at CPL 0.
	ModeLong64 Mode = iota + 1
	// ModeProtected32 is 32-bit protected mode without paging at CPL 0.
	ModeProtected32
	// ModeUser64 is 64-bit long mode with paging at CPL 3.
	ModeUser64
)

// String names the mode.
func (m Mode) String() string {
	switch m {
	case ModeLong64:
		return "long mode"
	case ModeProtected32:
		return "protected mode"
	case ModeUser64:
		return "user mode"
	}
	return fmt.Sprintf("Mode(%d)", int(m))
}

// Segment is a segment register with its hidden part (Intel SDM 3A 3.4.3,
// figure 3-8).
type Segment struct {
	Base     uint64
	Limit    uint32 // bytes, as the hidden register holds it (not scaled)
	Selector uint16
	Type     uint8 // descriptor type, bits 8 to 11
	DPL      uint8
	Present  bool
	DB       bool // default operand size: 32 bits
	S        bool // code or data, not a system descriptor
	L        bool // 64-bit code
	G        bool // limit counted in pages
}

// Table is a descriptor-table register.
type Table struct {
	Base  uint64
	Limit uint16 // bytes, minus one
}

// Entry is the state of the first vCPU when it starts, in terms of the
// architecture. Registers that are not named are zero, and the FPU, the local
// APIC and the MSRs are as after a reset.
type Entry struct {
	Mode Mode

	RIP, RSP, RBX, RSI, RDI, RFLAGS uint64

	CR0, CR3, CR4, EFER uint64

	GDT, IDT Table
	CS       Segment
	Data     Segment // DS, ES, FS, GS and SS
	TR, LDT  Segment
}
