package payload

import (
	"fmt"

	"ditto.vm/guest/boot"
	"ditto.vm/guest/payload/asm"
	"ditto.vm/memory"
)

// Where the parts of an image lie.
const (
	imageBase  memory.GPA = 0x100000
	statusPage memory.GPA = imageBase + memory.PageSize
	codeBase   memory.GPA = imageBase + 2*memory.PageSize

	// StatusPage is the page that host and program share.
	StatusPage = statusPage
)

// I/O ports that programs use.
const (
	portData   = 0x3f8 // UART data
	portStatus = 0x3fd // UART line status
	portExit   = 0xf4  // debugexit
)

// Program is a bare-metal program, ready to load. It can be loaded any number
// of times.
type Program struct {
	// TSCHz is the frequency of the guest's time-stamp counter, which a
	// program that keeps time needs before it is loaded; 0 when not known.
	TSCHz uint64

	name string
	// emit assembles the program's code; it starts at its first instruction.
	emit func(*asm.Assembler)
	// prepare fills the status page for a guest with that RAM; nil leaves it
	// zero.
	prepare func(ram []memory.Range) ([]byte, error)
}

// Name returns the program's name.
func (p *Program) Name() string { return p.name }

// Load puts the program into mem and returns how to start it in user mode. The
// vCPU must not run meanwhile.
func (p *Program) Load(mem *memory.Space) (*boot.Loaded, error) {
	var ram []memory.Range
	for _, r := range mem.Regions() {
		ram = append(ram, r.Range)
	}
	image, err := p.assemble(ram)
	if err != nil {
		return nil, err
	}
	if err := mem.WriteAt(image.bytes, imageBase); err != nil {
		return nil, fmt.Errorf("payload %s: %d bytes at %s: %w", p.name, len(image.bytes), imageBase, boot.ErrNoRoom)
	}
	return &boot.Loaded{Entry: image.entry()}, nil
}

// image is an assembled program.
type image struct {
	bytes  []byte
	start  uint64 // first instruction at CPL 3
	stub   uint64 // first instruction of the PVH entry
	tables uint64 // CR3
}

// assemble builds the image for a guest with that RAM.
func (p *Program) assemble(ram []memory.Range) (*image, error) {
	fail := func(err error) (*image, error) { return nil, fmt.Errorf("payload %s: %w", p.name, err) }
	if len(ram) == 0 {
		return fail(boot.ErrNoRoom)
	}
	status := []byte(nil)
	if p.prepare != nil {
		var err error
		if status, err = p.prepare(ram); err != nil {
			return fail(err)
		}
	}
	a := asm.New(uint64(codeBase))
	a.Label("start")
	p.emit(a)
	a.Label("stub")
	emitStub(a)
	tables := (a.Here() + memory.PageSize - 1) &^ (memory.PageSize - 1)
	a.Define("tables", tables)
	code, err := a.Finish()
	if err != nil {
		return fail(err)
	}
	maps, err := identityMap(tables, uint64(ram[len(ram)-1].End()))
	if err != nil {
		return fail(err)
	}
	b := make([]byte, tables-uint64(imageBase), tables-uint64(imageBase)+uint64(len(maps)))
	writeDescriptors(b)
	copy(b[statusPage-imageBase:codeBase-imageBase], status)
	copy(b[codeBase-imageBase:], code)
	return &image{bytes: append(b, maps...), start: a.Address("start"), stub: a.Address("stub"), tables: tables}, nil
}
