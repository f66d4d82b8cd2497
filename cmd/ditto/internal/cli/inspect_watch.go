package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/registry"
)

// Control sequences of terminals (ECMA-48, and xterm's for the other screen).
const (
	otherScreen = "\x1b[?1049h\x1b[?25l" // and hide the cursor
	firstScreen = "\x1b[?25h\x1b[?1049l"
	home        = "\x1b[H"
	endOfLine   = "\x1b[K"
	endOfScreen = "\x1b[J"
)

// barWidth is the length of the bar of all memory, in characters.
const barWidth = 30

// restFactor keeps looks at a large memory from taking more than a quarter of a
// core.
const restFactor = 3

// watch shows a machine's memory again and again on the terminal's other screen,
// until ctx ends or the machine does. What was shown last stays on the first.
func (e *Env) watch(ctx context.Context, name string, interval time.Duration) error {
	if !isTerminal(e.Stdout) {
		return exit.Errorf(exit.Usage, "--watch needs a terminal: in scripts call ditto inspect --quick --json again and again")
	}
	screen := e.Stdout.(*os.File)
	r, vm, remote, err := e.dial(name)
	if err != nil {
		return err
	}
	defer remote.Close()
	last, err := watchLoop(ctx, interval, screen, func(ctx context.Context) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, answerTimeout)
		defer cancel()
		memory, err := remote.Memory(ctx, api.MemoryQuery{})
		return inspection(vm.Name, memory, barWidth), err
	})
	_, printErr := io.WriteString(screen, last)
	if err == nil || ctx.Err() != nil {
		return printErr
	}
	if _, findErr := r.Find(name); errors.Is(findErr, registry.ErrNotRunning) {
		_, err := fmt.Fprintf(e.Stderr, "ditto: %s has ended\n", name)
		return err
	}
	return lookError(err, name)
}

// watchLoop draws what look returns, until ctx ends or look fails, and returns
// what was drawn last.
func watchLoop(ctx context.Context, interval time.Duration, screen *os.File, look func(context.Context) (string, error)) (last string, err error) {
	if _, err := io.WriteString(screen, otherScreen); err != nil {
		return "", err
	}
	defer func() { _, _ = io.WriteString(screen, firstScreen) }()
	for {
		began := time.Now()
		text, err := look(ctx)
		if err != nil {
			return last, err
		}
		took := time.Since(began)
		last = text
		columns, rows, err := term.GetSize(int(screen.Fd()))
		if err != nil {
			return last, fmt.Errorf("size of the terminal: %w", err)
		}
		hint := fmt.Sprintf("\nevery %s, Ctrl-C ends", interval)
		if _, err := io.WriteString(screen, clip(text+hint, columns, rows)); err != nil {
			return last, err
		}
		select {
		case <-ctx.Done():
			return last, nil
		case <-time.After(max(interval, restFactor*took)):
		}
	}
}

// clip returns what draws text over a screen of that size: longer lines and more
// lines than it has would scroll it.
func clip(text string, columns, rows int) string {
	lines := strings.Split(text, "\n")
	if rows > 0 && len(lines) > rows {
		lines = lines[:rows]
	}
	var out strings.Builder
	out.WriteString(home)
	for i, line := range lines {
		if i > 0 {
			out.WriteString("\r\n")
		}
		if runes := []rune(line); columns > 0 && len(runes) > columns {
			line = string(runes[:columns])
		}
		out.WriteString(line + endOfLine)
	}
	out.WriteString(endOfScreen)
	return out.String()
}
