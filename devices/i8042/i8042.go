// Package i8042 is the one part of the keyboard controller that has nothing to
// do with keyboards: the line that resets the CPU.
//
//	port 0x64  read   status: never busy, nothing to read
//	           write  command: 0xfe pulses the reset line
//
// Kernels use it as their way to reboot when they are told to (reboot=k), and
// ditto's reset vector does: a kernel that believes in neither ACPI nor EFI
// jumps there in real mode. The ACPI tables say that there is no 8042, so that
// nobody looks for a keyboard.
package i8042

// The register window: the command and status port.
const (
	Port = 0x64
	Size = 1
)

// CommandReset pulses output line 0, which is wired to the CPU's reset.
const CommandReset = 0xfe

// Device is the controller. It implements devices.Handler and has no state.
type Device struct{ onReset func() }

// New makes a controller that calls onReset, on the vCPU's thread, when the
// guest resets the machine.
func New(onReset func()) *Device { return &Device{onReset: onReset} }

// ReadRegister implements devices.Handler.
func (d *Device) ReadRegister(_ uint64, data []byte) { clear(data) }

// WriteRegister implements devices.Handler.
func (d *Device) WriteRegister(_ uint64, data []byte) {
	if len(data) == 1 && data[0] == CommandReset {
		d.onReset()
	}
}

// ResetVectorAddress is where a CPU in real mode begins after a reset, as far
// as software can jump there: FFFF:0000.
const ResetVectorAddress = 0xffff0

// ResetVector returns the code for [ResetVectorAddress]: it pulses the reset
// line and halts.
func ResetVector() []byte {
	return []byte{
		0xb0, CommandReset, // mov al, 0xfe
		0xe6, Port, // out 0x64, al
		0xfa,       // cli
		0xf4,       // hlt
		0xeb, 0xfd, // jmp to the hlt
	}
}
