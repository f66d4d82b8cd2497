package cli

import (
	"fmt"
	"io"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// progress shows slow steps: a bar on a terminal, a line a step elsewhere. It
// implements debian.Progress. The zero value of bar says that there is none.
type progress struct {
	out  io.Writer
	bars *mpb.Progress // nil without a terminal
	bar  *mpb.Bar
	what string
}

// barUnits is the resolution of a bar.
const barUnits = 1000

// newProgress returns a display on standard error. It costs nothing until a
// step reports.
func (e *Env) newProgress() *progress { return &progress{out: e.Stderr} }

// Report shows that the step what has come to fraction.
func (p *progress) Report(what string, fraction float64) {
	if what != p.what {
		p.begin(what)
	}
	if p.bar != nil {
		p.bar.SetCurrent(int64(fraction * barUnits))
	}
}

func (p *progress) begin(what string) {
	p.end()
	p.what = what
	if !isTerminal(p.out) {
		fmt.Fprintf(p.out, "ditto: %s\n", what)
		return
	}
	if p.bars == nil {
		p.bars = mpb.New(mpb.WithOutput(p.out), mpb.WithWidth(40))
	}
	p.bar = p.bars.AddBar(barUnits,
		mpb.PrependDecorators(decor.Name(what, decor.WCSyncSpaceR)),
		mpb.AppendDecorators(decor.Percentage(decor.WCSyncSpace), decor.Elapsed(decor.ET_STYLE_MMSS, decor.WCSyncSpace)),
	)
}

// end finishes the current bar, complete or not.
func (p *progress) end() {
	if p.bar != nil && !p.bar.Completed() {
		p.bar.Abort(false)
	}
	p.bar, p.what = nil, ""
}

// close gives the terminal back.
func (p *progress) close() {
	p.end()
	if p.bars != nil {
		p.bars.Wait()
		p.bars = nil
	}
}
