package terminal

import (
	"bytes"
	"io"
	"strconv"
	"strings"
	"sync"
)

// The lines of the guest's init that a command's output lies between; see
// guest/init. A console line ends with CR LF.
const (
	initPrefix = "ditto-init: "
	readyLine  = initPrefix + "ready "
	exitLine   = initPrefix + "exit status="
)

// maxLine is how much of a line is looked at; init's own are shorter.
const maxLine = 256

// CommandOutput lets through only what a command run by ditto's init prints:
// what the console shows after init's ready line and before its exit line. It
// also learns the command's exit status. It may be written to by one goroutine
// and asked by others.
type CommandOutput struct {
	out io.Writer
	// unixLines turns CR LF into LF, for output that is no terminal.
	unixLines bool

	mu      sync.Mutex // guards what follows
	started bool
	ended   bool
	status  int
	held    []byte // not decided yet: it may belong to a line of init's
	midLine bool   // held follows output on the same line
	before  []byte // the latest output before the command started
	cr      bool   // a CR is held back: an LF may follow
}

// keepBefore is how much of the output before the command is kept, to explain
// why it never started.
const keepBefore = 4 << 10

// NewCommandOutput returns a filter in front of out, which may be nil to only
// learn the status.
func NewCommandOutput(out io.Writer, unixLines bool) *CommandOutput {
	if out == nil {
		out = io.Discard
	}
	return &CommandOutput{out: out, unixLines: unixLines}
}

// Status returns the command's exit status, once it has ended.
func (c *CommandOutput) Status() (status int, ended bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.status, c.ended
}

// Before returns the end of what was printed before the command started, if it
// never did.
func (c *CommandOutput) Before() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.started {
		return ""
	}
	return string(c.before) + string(c.held)
}

// Write takes console output. It fails only when the writer behind it does.
func (c *CommandOutput) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held = append(c.held, p...)
	var pass []byte
	for {
		piece, more := c.next()
		pass = append(pass, c.visible(piece)...)
		if !more {
			break
		}
	}
	if c.unixLines {
		pass = c.toUnix(pass)
	}
	if len(pass) == 0 {
		return len(p), nil
	}
	if _, err := c.out.Write(pass); err != nil {
		return 0, err
	}
	return len(p), nil
}

// next takes from held what can be decided: a line of init's, which it notes
// and drops, or output. It returns false when more input is needed.
// Preconditions: mu is held.
func (c *CommandOutput) next() (output []byte, more bool) {
	if len(c.held) == 0 {
		return nil, false
	}
	end := bytes.IndexByte(c.held, '\n') + 1
	line := c.held
	if end > 0 {
		line = c.held[:end]
	}
	if !c.midLine && couldBeInit(line) {
		if end == 0 && len(line) < maxLine {
			return nil, false
		}
		if end > 0 && c.isInit(line) {
			c.held = c.held[end:]
			return nil, true
		}
	}
	// A command whose last line has no end: init's exit line follows on it.
	if at := bytes.Index(line, []byte(exitLine)); at > 0 || at == 0 && c.midLine {
		c.midLine, c.held = false, c.held[at:]
		return line[:at], true
	}
	keep := 0
	if end == 0 {
		keep = overlap(line, exitLine)
	}
	taken := len(line) - keep
	c.held = c.held[taken:]
	c.midLine = end == 0
	return line[:taken], end > 0
}

// overlap is the length of the longest end of line that begins pattern.
func overlap(line []byte, pattern string) int {
	for n := min(len(line), len(pattern)); n > 0; n-- {
		if string(line[len(line)-n:]) == pattern[:n] {
			return n
		}
	}
	return 0
}

// couldBeInit tells whether a line that begins so may be one of init's.
func couldBeInit(line []byte) bool {
	n := min(len(line), len(initPrefix))
	return string(line[:n]) == initPrefix[:n]
}

// toUnix turns CR LF into LF, also when they come apart. Preconditions: mu is
// held.
func (c *CommandOutput) toUnix(p []byte) []byte {
	if c.cr && len(p) > 0 {
		p = append([]byte{'\r'}, p...)
		c.cr = false
	}
	if n := len(p); n > 0 && p[n-1] == '\r' {
		c.cr = true
		p = p[:n-1]
	}
	return bytes.ReplaceAll(p, []byte("\r\n"), []byte("\n"))
}

// isInit notes the lines of init that matter and reports whether line is one of
// init's. Preconditions: mu is held.
func (c *CommandOutput) isInit(line []byte) bool {
	text := string(line)
	switch {
	case c.ended:
	case !c.started && strings.HasPrefix(text, readyLine):
		c.started = true
	case c.started && strings.HasPrefix(text, exitLine):
		digits, _, _ := strings.Cut(strings.TrimSpace(text[len(exitLine):]), " ")
		if status, err := strconv.ParseUint(digits, 10, 8); err == nil {
			c.status, c.ended = int(status), true
		}
	}
	return strings.HasPrefix(text, initPrefix)
}

// visible returns p if it is the command's output. Preconditions: mu is held.
func (c *CommandOutput) visible(p []byte) []byte {
	switch {
	case !c.started:
		c.before = append(c.before, p...)
		if n := len(c.before) - keepBefore; n > 0 {
			c.before = append([]byte(nil), c.before[n:]...)
		}
		return nil
	case c.ended:
		return nil
	}
	return p
}
