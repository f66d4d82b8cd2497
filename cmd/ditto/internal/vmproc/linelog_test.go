package vmproc

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
)

func TestLineLog(t *testing.T) {
	var out bytes.Buffer
	l := &lineLog{log: slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == "said" {
				return a
			}
			return slog.Attr{}
		},
	}))}
	for _, piece := range []string{"one\ntw", "o\n\n", strings.Repeat("x", maxLogLine+3), "\nend"} {
		if n, err := l.Write([]byte(piece)); n != len(piece) || err != nil {
			t.Error(n, err)
		}
	}
	want := "said=one\nsaid=two\nsaid=" + strings.Repeat("x", maxLogLine) + "\nsaid=xxx\n"
	if out.String() != want {
		t.Errorf("%q", &out)
	}
}
