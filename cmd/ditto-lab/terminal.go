package main

import (
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"ditto.vm/internal/lab"
)

// attachTerminal gives cmd a terminal of its own if stdin and stdout are one,
// and puts ours into raw mode until restore is called.
func attachTerminal(cmd *lab.Cmd, stdin *os.File, stdout io.Writer) (restore func(), err error) {
	nothing := func() {}
	out, ok := stdout.(*os.File)
	if !ok || !term.IsTerminal(int(stdin.Fd())) || !term.IsTerminal(int(out.Fd())) {
		return nothing, nil
	}
	size := func() lab.Terminal {
		cols, rows, err := term.GetSize(int(out.Fd()))
		if err != nil {
			return lab.Terminal{}
		}
		return lab.Terminal{Rows: uint16(rows), Cols: uint16(cols)}
	}
	old, err := term.MakeRaw(int(stdin.Fd()))
	if err != nil {
		return nothing, fmt.Errorf("terminal: %w", err)
	}
	winch := make(chan os.Signal, 1)
	signal.Notify(winch, unix.SIGWINCH)
	resized := make(chan lab.Terminal)
	done := make(chan struct{})
	go func() {
		for {
			select {
			case <-winch:
			case <-done:
				return
			}
			select {
			case resized <- size():
			case <-done:
				return
			}
		}
	}()
	t := size()
	t.Resized = resized
	cmd.Terminal = &t
	return func() {
		signal.Stop(winch)
		close(done)
		_ = term.Restore(int(stdin.Fd()), old)
	}, nil
}

// parseSize reads a number of bytes with an optional suffix K, M, G or T.
func parseSize(s string) (int64, error) {
	shift := 0
	if i := strings.IndexByte("KMGT", last(s)); i >= 0 {
		shift = 10 * (i + 1)
		s = s[:len(s)-1]
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n <= 0 || n > (1<<62)>>shift {
		return 0, fmt.Errorf(`%q is not a size like "64G"`, s)
	}
	return n << shift, nil
}

func last(s string) byte {
	if s == "" {
		return 0
	}
	return s[len(s)-1]
}
