package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"time"

	"ditto.vm/cmd/ditto/internal/vmproc"
	"ditto.vm/migration/live"
)

// receiveDisplay shows what becomes of machines that come.
type receiveDisplay struct {
	out, errs io.Writer
	lines     *json.Encoder // nil for text
	// last: the command ends with the migration, and tells its failure itself.
	last bool
	// quiet: somebody else tells everything.
	quiet bool
}

func newReceiveDisplay(out, errs io.Writer, asJSON bool) *receiveDisplay {
	d := &receiveDisplay{out: out, errs: errs}
	if asJSON {
		d.lines = json.NewEncoder(out)
	}
	return d
}

// say prints a line of JSON, or text.
func (d *receiveDisplay) say(event any, out io.Writer, format string, args ...any) {
	if d.quiet {
		return
	}
	if d.lines != nil {
		_ = d.lines.Encode(event) // who does not read it does not want it
		return
	}
	fmt.Fprintf(out, format+"\n", args...)
}

func (d *receiveDisplay) listening(address string) {
	d.say(struct {
		Event   string `json:"event"`
		Address string `json:"address"`
	}{"listening", address}, d.out, "listening on %s", address)
}

func (d *receiveDisplay) arrived(ev vmproc.ReceiveEvent) {
	r := ev.Result
	if r == nil {
		r = &live.Result{}
	}
	d.say(ev, d.out, "%s has arrived: %s received in %s; it stood still for %s", ev.Name,
		humanBytes(r.Received), r.Took.Round(time.Millisecond), r.Downtime.Round(10*time.Microsecond))
}

func (d *receiveDisplay) failed(ev vmproc.ReceiveEvent) {
	what := "a machine"
	if ev.Name != "" {
		what = ev.Name
	}
	d.say(ev, d.errs, "ditto: %s did not arrive: %s", what, ev.Error)
}

// other shows what is on the way.
func (d *receiveDisplay) other(ev vmproc.ReceiveEvent) {
	if d.lines != nil || ev.Event == vmproc.ReceiveOffered {
		d.say(ev, d.errs, "ditto: %s is coming", ev.Name)
	}
}
