package vmproc

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/migration/live"
)

// Outcomes keeps what became of migrations to this host, for sources whose
// connection ended in the moment of the commit. There is a file for each, made
// before the machine is prepared and locked as long as the process that decides
// lives:
//
//	pending, locked      not decided yet
//	committed            the machine is here
//	pending, not locked  that process has ended: it never will be, and whoever
//	                     looks writes that down under the lock
//	never                it never will be
//	no file              nothing is known of it: that decides nothing
//
// A file says in which boot of the host it was made. After another boot nothing
// is known, since what was written last may be lost.
type Outcomes struct {
	dir  string
	boot string
}

// Words of the files, of one length.
const (
	wordPending   = "pending  "
	wordCommitted = "committed"
	wordNever     = "never    "
	wordBytes     = len(wordPending)
)

// outcomeLife is how long outcomes are kept. A source asks within minutes; its
// user within days.
const outcomeLife = 30 * 24 * time.Hour

// OpenOutcomes returns the outcomes in a folder, which it makes, and removes old
// ones.
func OpenOutcomes(dir string) (*Outcomes, error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("outcomes of migrations: %w", err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("outcomes of migrations: %w", err)
	}
	o := &Outcomes{dir: dir, boot: strings.TrimSpace(string(boot))}
	return o, o.prune(time.Now().Add(-outcomeLife))
}

// prune removes what was decided, and last written, before some time.
func (o *Outcomes) prune(before time.Time) error {
	entries, err := os.ReadDir(o.dir)
	if err != nil {
		return fmt.Errorf("outcomes of migrations: %w", err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() || info.ModTime().After(before) {
			continue
		}
		f, err := os.OpenFile(filepath.Join(o.dir, e.Name()), os.O_RDWR|unix.O_NOFOLLOW, 0)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			_ = os.Remove(f.Name()) // the next one tries again
		}
		_ = f.Close()
	}
	return nil
}

func (o *Outcomes) path(t live.Token) string { return filepath.Join(o.dir, t.String()) }

// Decision is the outcome of one migration, which this process decides.
type Decision struct{ file *os.File }

// Begin says that this process decides about a migration. It fails if another
// one does, or did.
func (o *Outcomes) Begin(t live.Token) (*Decision, error) {
	f, err := os.OpenFile(o.path(t), os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("outcome of the migration: %w", err)
	}
	// Until it is locked and has a word nobody believes it. Who looks meanwhile
	// holds the lock for a moment.
	if err = unix.Flock(int(f.Fd()), unix.LOCK_EX); err == nil {
		_, err = f.WriteAt([]byte(wordPending+"\n"+o.boot+"\n"), 0)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("outcome of the migration: %w", err), f.Close())
	}
	return &Decision{f}, nil
}

// Commit says that the machine is here. It needs no right but the open file.
func (d *Decision) Commit() error {
	if _, err := d.file.WriteAt([]byte(wordCommitted), 0); err != nil {
		return fmt.Errorf("outcome of the migration: %w", err)
	}
	return nil
}

// Close says that nothing more is decided here: what is not committed never will
// be.
func (d *Decision) Close() error { return d.file.Close() }

// Lookup tells what became of a migration.
func (o *Outcomes) Lookup(t live.Token) live.Outcome {
	f, err := os.OpenFile(o.path(t), os.O_RDWR|unix.O_NOFOLLOW, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return live.OutcomeUnknown
	case err != nil:
		return live.OutcomePending // a process without rights does not know
	}
	defer func() { _ = f.Close() }() // what counts was written
	alone := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
	b := make([]byte, 128)
	n, _ := f.ReadAt(b, 0)
	word, boot, _ := strings.Cut(string(b[:n]), "\n")
	if strings.TrimSpace(boot) != o.boot {
		if !alone {
			return live.OutcomePending // it is being made
		}
		return live.OutcomeUnknown
	}
	switch word {
	case wordCommitted:
		return live.OutcomeCommitted
	case wordNever:
		return live.OutcomeNever
	case wordPending:
	default:
		return live.OutcomeUnknown
	}
	if !alone {
		return live.OutcomePending
	}
	if _, err := f.WriteAt([]byte(wordNever), 0); err != nil {
		return live.OutcomePending
	}
	return live.OutcomeNever
}
