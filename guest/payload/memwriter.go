package payload

import (
	"fmt"
	"time"

	"ditto.vm/guest/boot"
	"ditto.vm/memory"
)

// Order is the order in which the memory writer visits its pages.
type Order uint64

// The orders. The zero value is sequential.
const (
	Sequential Order = iota // one after the other, again and again
	Random                  // uniformly
	Hot                     // 15 of 16 writes go to the first eighth
)

var orderNames = [...]string{"sequential", "random", "hot"}

// String returns sequential, random or hot.
func (o Order) String() string {
	if int(o) < len(orderNames) {
		return orderNames[o]
	}
	return fmt.Sprintf("Order(%d)", uint64(o))
}

// MemWriterConfig is the work of a memory writer.
type MemWriterConfig struct {
	// WorkingSet is how much memory is written, in bytes, a multiple of a
	// page; 0 is all RAM above 4 MiB.
	WorkingSet uint64
	Order      Order
	// Words is how many 8-byte words of a page one write changes, 1 to 512;
	// 0 is the whole page.
	Words int
	// Fill has the program first write every page of the working set once, in
	// sequence and as fast as it goes, and then say [FilledLine].
	Fill bool
	// Rate is how many pages are written a second; 0 is as fast as it goes.
	// It needs Program.TSCHz.
	Rate uint64
	// Limit ends the program, after a check, when so many pages were
	// written; 0 is never.
	Limit uint64
	Seed  uint64
	// CheckEvery makes the program check its memory each time so many pages
	// were written; 0 is only at the end and when told.
	CheckEvery uint64
	// Stall is the shortest gap between two steps that counts as a stall;
	// 0 is 100 us, or 2^18 cycles without Program.TSCHz.
	Stall time.Duration
}

// FilledLine is what a memory writer says when its working set is filled.
const FilledLine = "memwriter filled\n"

const (
	// memWriterStart is where the working set begins: behind the image and
	// the page tables of the largest guest.
	memWriterStart memory.GPA = 4 << 20

	wordsPerPage     = memory.PageSize / 8
	defaultStall     = 100 * time.Microsecond
	defaultStallTSC  = 1 << 18
	pollsPerSecond   = 10
	defaultPollEvery = 1 << 28 // cycles, without a known frequency
)

// MemWriter returns a program that keeps writing a working set and can tell
// whether its memory is still what it wrote.
//
// Each write takes the next page in order, counts the page's generation up and
// fills words with values that follow from seed, page and generation:
//
//	word 0  generation: how often the page was written; 0 is a zero page
//	word i  mix(seed, page, generation) + i*step, for i below Words
//
// So the content of every page is known from its first word, and the
// generations add up to the number of writes: a page that is wrong, stale or
// lost is noticed. The program reads the time-stamp counter at every step and
// counts gaps, which are what the host takes from it.
//
// It reports on its status page ([ReadMemWriter]) and obeys [Command] there. On
// the UART it takes one letter at a time: s reports, c checks and reports, q
// checks, reports and ends the machine with status 0, or 1 when the check
// failed.
func MemWriter(config MemWriterConfig) (*Program, error) {
	if config.Words == 0 {
		config.Words = wordsPerPage
	}
	switch {
	case config.WorkingSet%memory.PageSize != 0:
		return nil, fmt.Errorf("payload memwriter: working set of %d bytes is not whole pages", config.WorkingSet)
	case int(config.Order) >= len(orderNames):
		return nil, fmt.Errorf("payload memwriter: unknown order %d", config.Order)
	case config.Words < 1 || config.Words > wordsPerPage:
		return nil, fmt.Errorf("payload memwriter: %d words a write, not 1 to %d", config.Words, wordsPerPage)
	case config.Stall < 0 || config.Stall > time.Hour:
		return nil, fmt.Errorf("payload memwriter: stalls of %s", config.Stall)
	}
	p := &Program{name: "memwriter", emit: emitMemWriter}
	p.prepare = func(ram []memory.Range) ([]byte, error) { return config.status(ram, p.TSCHz) }
	return p, nil
}

// status returns the status page at the start.
func (c *MemWriterConfig) status(ram []memory.Range, tscHz uint64) ([]byte, error) {
	if c.Rate > 0 && tscHz == 0 {
		return nil, fmt.Errorf("a rate of %d pages/s needs the frequency of the time-stamp counter", c.Rate)
	}
	low, high, err := c.place(ram)
	if err != nil {
		return nil, err
	}
	pages := (low.Size + high.Size) / memory.PageSize
	s := statusWords{
		wordMagic: memWriterMagic, wordLimit: c.Limit, wordSeed: c.Seed, wordWords: uint64(c.Words),
		wordOrder: uint64(c.Order), wordPages: pages, wordHotPages: max(pages/8, 1), wordCheckEvery: c.CheckEvery,
		wordLowStart: uint64(low.Start), wordLowPages: low.Size / memory.PageSize, wordHighStart: uint64(high.Start),
		wordStallMin: defaultStallTSC, wordPollEvery: defaultPollEvery, wordTSCHz: tscHz,
		wordFirstBad: noPage, wordNextCheck: c.CheckEvery,
		// xorshift must not start at zero.
		wordRandom: c.Seed*mixPage | 1,
	}
	if tscHz > 0 {
		stall := c.Stall
		if stall == 0 {
			stall = defaultStall
		}
		s[wordStallMin] = uint64(stall.Seconds() * float64(tscHz))
		s[wordPollEvery] = tscHz / pollsPerSecond
	}
	if c.Fill {
		s[wordFill] = pages
	}
	if c.Rate > 0 {
		s[wordInterval] = max(tscHz/c.Rate, 1)
	}
	return s.encode(), nil
}

// place cuts the working set out of RAM: what fits below the hole, the rest
// above it.
func (c *MemWriterConfig) place(ram []memory.Range) (low, high memory.Range, err error) {
	available := uint64(0)
	if end := ram[0].End(); end > memWriterStart {
		low = memory.Range{Start: memWriterStart, Size: uint64(end - memWriterStart)}
		available = low.Size
	}
	if len(ram) > 1 {
		high = ram[1]
		available += high.Size
	}
	want := c.WorkingSet
	if want == 0 {
		want = available
	}
	if want > available || want == 0 {
		return low, high, fmt.Errorf("working set of %d MiB, but RAM above %d MiB has %d MiB: %w",
			want>>20, memWriterStart>>20, available>>20, boot.ErrNoRoom)
	}
	low.Size = min(low.Size, want)
	high.Size = want - low.Size
	return low, high, nil
}
