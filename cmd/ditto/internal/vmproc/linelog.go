package vmproc

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
)

// maxLogLine bounds a line of another process.
const maxLogLine = 1 << 10

// lineLog turns the output of another process into log records, one a line.
type lineLog struct {
	log *slog.Logger

	mu   sync.Mutex // guards rest
	rest []byte
}

// Write takes output, whole lines or not.
func (l *lineLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rest = append(l.rest, p...)
	for {
		line, rest, found := bytes.Cut(l.rest, []byte{'\n'})
		switch {
		case len(line) > maxLogLine:
			line, rest = l.rest[:maxLogLine], l.rest[maxLogLine:]
		case !found:
			return len(p), nil
		}
		if text := strings.TrimSpace(string(line)); text != "" {
			l.log.Info("network", "said", text)
		}
		l.rest = rest
	}
}
