package labrun

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"ditto.vm/internal/labtest"
)

// Figure is a measured figure of a claim.
type Figure struct {
	ID, Text string
}

// Report is what a test binary's output said.
type Report struct {
	Passed, Failed, Skipped int // tests and subtests
	Skips                   []string
	Figures                 []Figure
}

// check tells what is wrong with a run that ended with code.
func (r *Report) check(code int) error {
	switch {
	case code != 0:
		return fmt.Errorf("%d tests failed, exit status %d", r.Failed, code)
	case r.Failed > 0:
		return fmt.Errorf("%d tests failed", r.Failed)
	case r.Skipped > 0:
		return fmt.Errorf("%d tests were skipped where nothing may skip: %s", r.Skipped, strings.Join(r.Skips, ", "))
	case r.Passed == 0:
		return errors.New("no test was run")
	}
	return nil
}

// maxLine bounds a line of output that is searched; longer ones are cut.
const maxLine = 64 << 10

// scanner passes output on and reads it line by line.
type scanner struct {
	mu     sync.Mutex
	dst    io.Writer
	line   []byte
	report *Report
}

func (s *scanner) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for rest := b; len(rest) > 0; {
		i := bytes.IndexByte(rest, '\n')
		part := rest
		if i >= 0 {
			part = rest[:i]
		}
		if room := maxLine - len(s.line); len(part) > room {
			part = part[:room]
		}
		s.line = append(s.line, part...)
		if i < 0 {
			break
		}
		s.report.scan(string(s.line))
		s.line = s.line[:0]
		rest = rest[i+1:]
	}
	return s.dst.Write(b)
}

// scan reads one line of what a test binary prints with -test.v.
func (r *Report) scan(line string) {
	if id, text, ok := labtest.ParseProof(line); ok {
		r.Figures = append(r.Figures, Figure{id, text})
	}
	verdict, ok := strings.CutPrefix(strings.TrimLeft(line, " "), "--- ")
	if !ok {
		return
	}
	what, rest, ok := strings.Cut(verdict, ": ")
	if !ok {
		return
	}
	name, _, _ := strings.Cut(rest, " ")
	switch what {
	case "PASS":
		r.Passed++
	case "FAIL":
		r.Failed++
	case "SKIP":
		r.Skipped++
		r.Skips = append(r.Skips, name)
	}
}
