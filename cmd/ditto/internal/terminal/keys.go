package terminal

// prefix is Ctrl-a, which starts a command of ditto's.
const prefix = 0x01

// Command is what the user asked ditto, not the guest.
type Command int

// The commands behind Ctrl-a.
const (
	None   Command = iota
	Detach         // d: leave, the machine runs on
	Quit           // x: stop the machine; again: kill it
	Help           // h or ?: show the keys
)

// HelpText lists the keys.
const HelpText = "Ctrl-a d detach, Ctrl-a x stop the machine (twice: kill it), Ctrl-a a send Ctrl-a, Ctrl-a h this help"

// Keys finds commands in what is typed. The zero value is ready.
type Keys struct{ pending bool }

// Next consumes input up to and including a command. It returns what belongs to
// the guest, the command, and the input that is left.
func (k *Keys) Next(input []byte) (guest []byte, c Command, rest []byte) {
	for i, b := range input {
		if !k.pending {
			if b == prefix {
				k.pending = true
			} else {
				guest = append(guest, b)
			}
			continue
		}
		k.pending = false
		switch b {
		case 'd', 'D':
			return guest, Detach, input[i+1:]
		case 'x', 'X':
			return guest, Quit, input[i+1:]
		case 'h', 'H', '?':
			return guest, Help, input[i+1:]
		case 'a', 'A', prefix:
			guest = append(guest, prefix)
		default:
			// Not a command: the guest gets both keys, as typed.
			guest = append(guest, prefix, b)
		}
	}
	return guest, None, nil
}
