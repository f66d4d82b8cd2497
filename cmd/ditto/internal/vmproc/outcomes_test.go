package vmproc

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ditto.vm/migration/live"
)

func TestMigrationOutcomes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "outcomes")
	o, err := OpenOutcomes(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := func(token live.Token, want live.Outcome) {
		t.Helper()
		if got := o.Lookup(token); got != want {
			t.Errorf("%v, want %v", got, want)
		}
	}
	token := func(n byte) live.Token { return live.Token{n} }
	want(token(1), live.OutcomeUnknown)

	committed, err := o.Begin(token(1))
	if err != nil {
		t.Fatal(err)
	}
	want(token(1), live.OutcomePending)
	if _, err := o.Begin(token(1)); err == nil {
		t.Error("two processes decide about one migration")
	}
	if err := committed.Commit(); err != nil {
		t.Fatal(err)
	}
	want(token(1), live.OutcomeCommitted)
	if err := committed.Close(); err != nil {
		t.Fatal(err)
	}
	want(token(1), live.OutcomeCommitted)

	never, err := o.Begin(token(2))
	if err != nil {
		t.Fatal(err)
	}
	want(token(2), live.OutcomePending)
	if err := never.Close(); err != nil { // as the end of a process does
		t.Fatal(err)
	}
	want(token(2), live.OutcomeNever)
	if _, err := o.Begin(token(2)); err == nil {
		t.Error("a migration begins that was said never to be")
	}

	// In another boot nothing is known, and of half a file neither.
	for _, test := range []struct{ from, to string }{{o.boot, strings.Repeat("0", len(o.boot))}, {wordCommitted, "com"}, {wordCommitted, ""}} {
		path := o.path(token(1))
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(strings.Replace(string(text), test.from, test.to, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		want(token(1), live.OutcomeUnknown)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		want(token(1), live.OutcomeCommitted)
	}

	// Old ones go, and those that are not decided stay.
	pending, err := o.Begin(token(3))
	if err != nil {
		t.Fatal(err)
	}
	defer pending.Close()
	if err := o.prune(time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	want(token(1), live.OutcomeUnknown)
	want(token(2), live.OutcomeUnknown)
	want(token(3), live.OutcomePending)
}
