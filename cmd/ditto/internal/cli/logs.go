package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/vmm/registry"
)

// logPoll is how often a followed log is looked at.
const logPoll = 100 * time.Millisecond

func (e *Env) logsCommand() *cobra.Command {
	var follow, own bool
	lines := -1
	cmd := &cobra.Command{
		Use:   "logs NAME",
		Short: "Show what a machine printed on its console",
		Long: `Show what a machine printed on its console since it was started, or, if it does
not run, during its last run. The log is kept on disk, the latest 8 to 16 MiB
of it.`,
		Example: `  ditto logs web
  ditto logs -f web
  ditto logs -n 20 web
  ditto logs --ditto web`,
		GroupID:           groupMachines,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: e.completeLogged,
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := e.Registry()
			if err != nil {
				return err
			}
			path := r.LogPath(args[0])
			if own {
				path = ownLogPath(r.StateDir(args[0]))
			}
			return e.showLog(cmd.Context(), r, args[0], path, lines, follow)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until the machine ends")
	cmd.Flags().IntVarP(&lines, "lines", "n", lines, "show only the last `N` lines")
	cmd.Flags().BoolVar(&own, "ditto", false, "show what ditto itself logged about the machine")
	return cmd
}

// completeLogged completes the names of machines that ever ran.
func (e *Env) completeLogged(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	r, err := e.Registry()
	if err != nil || len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return r.Logged(), cobra.ShellCompDirectiveNoFileComp
}

// showLog prints the log at path and what is added to it.
func (e *Env) showLog(ctx context.Context, r *registry.Registry, name, path string, lines int, follow bool) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return exit.Errorf(exit.NotFound, "no machine %q has a log (looked for %s)", name, path)
	}
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	defer f.Close()
	if lines >= 0 {
		if err := seekLines(f, lines); err != nil {
			return fmt.Errorf("log: %w", err)
		}
	}
	if _, err := io.Copy(e.Stdout, f); err != nil || !follow {
		return err
	}
	ticker := time.NewTicker(logPoll)
	defer ticker.Stop()
	for {
		// What was printed before the machine was seen to be gone is all.
		_, findErr := r.Find(name)
		if err := more(e.Stdout, f); err != nil {
			return fmt.Errorf("log: %w", err)
		}
		if errors.Is(findErr, registry.ErrNotRunning) {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// more prints what was added to f, from the start if it was turned over.
func more(out io.Writer, f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	at, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	if st.Size() < at {
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
	}
	_, err = io.Copy(out, f)
	return err
}

// seekLines moves f to where its last n lines start.
func seekLines(f *os.File, n int) error {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil || n == 0 {
		return err
	}
	const block = 8 << 10
	buf := make([]byte, block)
	found := 0
	for at := end; at > 0; {
		size := min(int64(block), at)
		at -= size
		if _, err := f.ReadAt(buf[:size], at); err != nil {
			return err
		}
		for i := size - 1; i >= 0; i-- {
			// The end of the last line does not start another.
			if buf[i] != '\n' || at+i == end-1 {
				continue
			}
			if found++; found == n {
				_, err := f.Seek(at+i+1, io.SeekStart)
				return err
			}
		}
	}
	_, err = f.Seek(0, io.SeekStart)
	return err
}

// tail returns the last lines of s, at most n.
func tail(s string, n int) string {
	b := bytes.TrimRight([]byte(s), "\r\n")
	parts := bytes.Split(b, []byte("\n"))
	if len(parts) > n {
		parts = parts[len(parts)-n:]
	}
	return string(bytes.Join(parts, []byte("\n")))
}
