package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"ditto.vm/migration/live"
	"ditto.vm/vmm/registry"
)

// migrateProgress is an event of a migration as JSON.
type migrateProgress struct {
	Event string `json:"event"` // progress
	eventBody
}

// eventBody are the members of an event.
type eventBody live.Event

// migrateResult is the end of a migration as JSON.
type migrateResult struct {
	Event string `json:"event"` // migrated
	Name  string `json:"name"`
	live.Report
}

// migrateFailure is that of one that failed.
type migrateFailure struct {
	Event string `json:"event"` // failed
	Name  string `json:"name"`
	Where string `json:"where"`
	Error string `json:"error"`
	Code  int    `json:"code"` // of the command
}

// migrateDisplay shows how far a migration is: a line that changes on a terminal,
// lines of JSON, or nothing.
type migrateDisplay struct {
	vm    registry.VM
	out   io.Writer // the terminal, nil for none
	lines *json.Encoder
	phase live.Phase
	wrote bool
}

func (e *Env) newMigrateDisplay(vm registry.VM, asJSON bool) *migrateDisplay {
	d := &migrateDisplay{vm: vm}
	switch {
	case asJSON:
		d.lines = json.NewEncoder(e.Stdout)
	case isTerminal(e.Stderr):
		d.out = e.Stderr
	}
	return d
}

// event shows one.
func (d *migrateDisplay) event(ev live.Event) {
	if d.lines != nil {
		_ = d.lines.Encode(migrateProgress{"progress", eventBody(ev)}) // the result tells a failure
	}
	if d.out == nil {
		return
	}
	end := ""
	if d.wrote && ev.Phase != d.phase {
		end = "\n" // what was reached stays on the screen
	}
	d.phase, d.wrote = ev.Phase, true
	fmt.Fprintf(d.out, "%s\r\033[K%s", end, describeEvent(ev))
}

// close ends the line.
func (d *migrateDisplay) close() {
	if d.out != nil && d.wrote {
		fmt.Fprintln(d.out)
	}
}

// describeEvent puts an event into a line.
func describeEvent(ev live.Event) string {
	var parts []string
	add := func(format string, args ...any) { parts = append(parts, fmt.Sprintf(format, args...)) }
	what := string(ev.Phase)
	if ev.Round > 0 && ev.Phase == live.PhaseCopy {
		what = fmt.Sprintf("%s, round %d", what, ev.Round)
	}
	if ev.Total > 0 {
		what += fmt.Sprintf(" %.0f %%", 100*float64(min(ev.Done, ev.Total))/float64(ev.Total))
	}
	add("%-20s", what)
	if ev.Sent.Total > 0 {
		add("%s sent", humanBytes(ev.Sent.Total))
	}
	if ev.Rate > 0 {
		add("%s/s", humanBytes(ev.Rate))
	}
	if ev.Sent.Named > 0 {
		add("names %s", humanBytes(ev.Sent.Named))
	}
	if ev.DirtyRate > 0 {
		add("guest writes %s/s", humanBytes(ev.DirtyRate))
	}
	if ev.Left > 0 {
		add("%s left", humanBytes(ev.Left))
	}
	if ev.Expected > 0 {
		add("downtime now %s", ev.Expected.Round(time.Millisecond))
	}
	if ev.Throttle > 0 {
		add("guest slowed by %d %%", ev.Throttle)
	}
	return strings.Join(parts, "  ")
}

// printMigrated says where the machine went, and what that cost.
func (e *Env) printMigrated(vm registry.VM, where string, r live.Report, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(e.Stdout).Encode(migrateResult{"migrated", vm.Name, r})
	}
	if r.RAM == 0 {
		// It went earlier, and the destination has said so now.
		_, err := fmt.Fprintf(e.Stdout, "%s runs at %s since its last migration\n", vm.Name, where)
		return err
	}
	_, err := fmt.Fprintf(e.Stdout, "%s runs at %s: %s of memory in %s, %s sent; it stood still for %s\n", vm.Name, where,
		humanBytes(r.RAM), r.Total.Round(time.Millisecond), humanBytes(r.Sent.Total), r.Downtime.Round(10*time.Microsecond))
	if err == nil {
		_, err = fmt.Fprintln(e.Stdout, describePages(r.Pages))
	}
	return err
}

// describePages says how memory traveled.
func describePages(p live.Pages) string {
	var parts []string
	for _, kind := range []struct {
		pages uint64
		what  string
	}{
		{p.Zero, "zero"}, {p.Named, "by name"}, {p.Duplicate, "duplicate"}, {p.Raw + p.Zstd, "as bytes"},
	} {
		if kind.pages > 0 {
			parts = append(parts, humanBytes(kind.pages*pageBytes)+" "+kind.what)
		}
	}
	line := strings.Join(parts, ", ")
	if p.Asked > 0 {
		line += fmt.Sprintf("; %s of it because names did not hold", humanBytes(p.Asked*pageBytes))
	}
	return line
}
