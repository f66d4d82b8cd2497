package payload

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"ditto.vm/memory"
)

// memWriterMagic says that the status page is a memory writer's, version 1.
const memWriterMagic = 0x3152574d4f545444 // "DTTOMWR1"

// noPage is the index of no page.
const noPage = ^uint64(0)

// Words of the status page, which is an array of 64-bit numbers. The host sets
// the first group before the program starts, and the command at any time.
const (
	wordMagic = iota
	wordCommand
	wordLimit
	wordInterval // cycles between writes, 0 for none
	wordStallMin // cycles
	wordSeed
	wordWords
	wordOrder
	wordPages
	wordHotPages
	wordLowStart
	wordLowPages
	wordHighStart
	wordPollEvery // cycles between looks at the UART
	wordCheckEvery
	wordTSCHz
	wordFill // writes to fill the working set, 0 when that is done
)

// What the program reports.
const (
	wordState = iota + 32
	wordWrites
	wordStalls
	wordStallCycles
	wordMaxGap
	wordChecks
	wordErrors
	wordFirstBad
	wordFirstTSC
	wordLastTSC
)

// What the program keeps for itself.
const (
	wordNextDue = iota + 48
	wordNextPoll
	wordNextCheck
	wordRandom
)

// wordHistogram is where 64 counters of gaps begin: counter n holds stalls of
// 2^n to 2^(n+1)-1 cycles.
const wordHistogram = 64

const statusWordCount = wordHistogram + 64

// statusWords is the status page by word.
type statusWords [statusWordCount]uint64

// encode returns the bytes of the page.
func (s *statusWords) encode() []byte {
	b := make([]byte, 0, statusWordCount*8)
	for _, v := range s {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

// State is what a memory writer is doing.
type State uint64

// The states. The zero value is before the first instruction.
const (
	StateRunning State = iota + 1
	StatePaused
	StateChecking
	StateDone
)

// Command tells a memory writer what to do.
type Command uint64

// The commands.
const (
	CommandRun    Command = iota // write
	CommandPause                 // stop writing and wait
	CommandCheck                 // check, then wait as in a pause
	CommandFinish                // check, report, end the machine
)

// MemWriterStatus is what a memory writer reports.
type MemWriterStatus struct {
	State    State
	Writes   uint64
	Stalls   uint64        // gaps of at least MemWriterConfig.Stall
	Stalled  time.Duration // their sum, 0 when the frequency is not known
	MaxGap   time.Duration // the longest, likewise
	Ran      time.Duration // since the first instruction, likewise
	Checks   uint64        // finished
	Errors   uint64        // pages with wrong content, and sums that were wrong
	FirstBad uint64        // index of the first wrong page, when there is one

	// In cycles of the time-stamp counter.
	StalledCycles, MaxGapCycles, RanCycles uint64
	// Histogram counts stalls of 2^n to 2^(n+1)-1 cycles.
	Histogram [64]uint64
}

// ErrNoMemWriter says that guest memory does not hold a memory writer's status page.
var ErrNoMemWriter = errors.New("no memory writer in this guest")

// readStatus reads the words of the status page. The guest may be running.
func readStatus(mem *memory.Space) (*statusWords, error) {
	var b [statusWordCount * 8]byte
	if err := mem.ReadAt(b[:], statusPage); err != nil {
		return nil, err
	}
	var s statusWords
	for i := range s {
		s[i] = binary.LittleEndian.Uint64(b[8*i:])
	}
	if s[wordMagic] != memWriterMagic {
		return nil, ErrNoMemWriter
	}
	return &s, nil
}

// ReadMemWriter returns what the memory writer in mem reports. While it runs,
// the numbers are of slightly different moments.
func ReadMemWriter(mem *memory.Space) (MemWriterStatus, error) {
	s, err := readStatus(mem)
	if err != nil {
		return MemWriterStatus{}, err
	}
	status := MemWriterStatus{
		State: State(s[wordState]), Writes: s[wordWrites], Stalls: s[wordStalls],
		Checks: s[wordChecks], Errors: s[wordErrors], FirstBad: s[wordFirstBad],
		StalledCycles: s[wordStallCycles], MaxGapCycles: s[wordMaxGap], RanCycles: s[wordLastTSC] - s[wordFirstTSC],
		Histogram: [64]uint64(s[wordHistogram:]),
	}
	status.Stalled = cycles(status.StalledCycles, s[wordTSCHz])
	status.MaxGap = cycles(status.MaxGapCycles, s[wordTSCHz])
	status.Ran = cycles(status.RanCycles, s[wordTSCHz])
	return status, nil
}

// cycles converts cycles to a duration, 0 when the frequency is 0.
func cycles(n, hz uint64) time.Duration {
	if hz == 0 {
		return 0
	}
	return time.Duration(float64(n) / float64(hz) * float64(time.Second))
}

// CommandMemWriter gives the memory writer in mem a command. It obeys at its
// next step.
func CommandMemWriter(mem *memory.Space, command Command) error {
	if _, err := readStatus(mem); err != nil {
		return err
	}
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(command))
	return mem.WriteAt(b[:], statusPage+8*wordCommand)
}

// Constants of the values that are written (the multipliers of SplitMix64).
const (
	mixPage       = 0x9e3779b97f4a7c15
	mixGeneration = 0xbf58476d1ce4e5b9
	mixStep       = 0x94d049bb133111eb
)

// VerifyMemWriter checks the working set from outside, on a paused guest, and
// returns how many pages are wrong and the first of them. The generations must
// add up to the writes.
func VerifyMemWriter(mem *memory.Space) (wrong uint64, err error) {
	s, err := readStatus(mem)
	if err != nil {
		return 0, err
	}
	sum := uint64(0)
	for page := range s[wordPages] {
		b, err := mem.View(s.pageAddress(page), memory.PageSize)
		if err != nil {
			return wrong, fmt.Errorf("working set page %d: %w", page, err)
		}
		sum += binary.LittleEndian.Uint64(b)
		if !s.pageRight(page, b) {
			wrong++
		}
	}
	if sum != s[wordWrites] {
		return wrong, fmt.Errorf("pages were written %d times by their generations, %d by the program", sum, s[wordWrites])
	}
	return wrong, nil
}

// pageAddress returns where a page of the working set lies.
func (s *statusWords) pageAddress(page uint64) memory.GPA {
	if page < s[wordLowPages] {
		return memory.GPA(s[wordLowStart] + page*memory.PageSize)
	}
	return memory.GPA(s[wordHighStart] + (page-s[wordLowPages])*memory.PageSize)
}

// pageRight reports whether b is what its first word says.
func (s *statusWords) pageRight(page uint64, b []byte) bool {
	le := binary.LittleEndian
	generation := le.Uint64(b)
	value, step := uint64(0), uint64(0)
	if generation != 0 {
		value, step = s[wordSeed]+page*mixPage+generation*mixGeneration, mixStep
	}
	for i := uint64(1); i < s[wordWords] && i < wordsPerPage; i++ {
		value += step
		if le.Uint64(b[8*i:]) != value {
			return false
		}
	}
	return true
}
