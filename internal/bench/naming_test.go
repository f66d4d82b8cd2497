package bench

import (
	"context"
	"errors"
	"testing"
	"time"
)

// TestNaming does the work of the naming pass with little memory: each way must
// name all of it as it claims.
func TestNaming(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	n := &naming{memory: 16 << 20, other: 8 << 20}
	defer func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}()
	err := n.open(ctx, t.TempDir())
	if missing := (*Unavailable)(nil); errors.As(err, &missing) {
		t.Skip(missing)
	}
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range n.Contestants() {
		got, err := n.Run(ctx, i)
		if err != nil || got["rate"] <= 0 || got["all-cores"] <= 0 {
			t.Errorf("%s: %v, %v", c.Name, got, err)
		}
	}
}
