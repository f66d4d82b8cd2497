package cli

import (
	"strings"
	"sync"
	"testing"
	"time"
)

// screenText collects what is written to a terminal.
type screenText struct {
	mu   sync.Mutex
	text strings.Builder
}

// Write implements io.Writer.
func (s *screenText) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

// String returns all of it.
func (s *screenText) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// await returns when want was written, which must come.
func (s *screenText) await(t *testing.T, want string) {
	t.Helper()
	for !strings.Contains(s.String(), want) {
		select {
		case <-t.Context().Done():
			t.Fatalf("%q was not shown in %q", want, s.String())
		case <-time.After(time.Millisecond):
		}
	}
}
