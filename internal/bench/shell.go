package bench

import (
	"context"
	"fmt"
	"strconv"
	"strings"
)

// shellGuest is a guest whose console is a shell, driven line by line.
type shellGuest struct {
	*child
	seq int // of the last command
}

// shellCmdline makes a shell on the Debian root file system the guest's first
// process after the initramfs.
const shellCmdline = "console=ttyS0 quiet panic=-1 root=/dev/vda ro init=/bin/sh ditto.net=off"

// shellSetup makes the read-only root usable.
const shellSetup = "stty -echo; export PS1= PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LC_ALL=C; " +
	"mountpoint -q /proc || mount -t proc proc /proc; mountpoint -q /sys || mount -t sysfs sys /sys; " +
	"mountpoint -q /dev || mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp; mount -t tmpfs run /run; cd /tmp"

// startShell starts a guest and waits for its shell.
func startShell(ctx context.Context, args []string) (*shellGuest, error) {
	c, err := startChild(args, true)
	if err != nil {
		return nil, err
	}
	g, err := joinShell(ctx, c)
	if err != nil {
		c.stop()
		return nil, err
	}
	return g, nil
}

// joinShell waits for the shell of a guest that was started with [shellCmdline].
func joinShell(ctx context.Context, c *child) (*shellGuest, error) {
	g := &shellGuest{child: c}
	// dash's prompt for root: it has no other way of saying that it listens.
	if _, _, err := c.waitFor(ctx, 0, "# "); err != nil {
		return nil, err
	}
	_, err := g.run(ctx, shellSetup)
	return g, err
}

// run has the shell execute one line and returns what it printed. An exit
// status other than 0 is an error.
func (g *shellGuest) run(ctx context.Context, line string) (string, error) {
	g.seq++
	// The quotes keep the terminal's echo from looking like the answer.
	begin, end := fmt.Sprintf("<bench-%d>", g.seq), fmt.Sprintf("</bench-%d ", g.seq)
	from := g.out.size()
	text := fmt.Sprintf("echo \"<\"bench-%d'>'; %s; echo \"<\"/bench-%d $? '>'\n", g.seq, line, g.seq)
	if _, err := g.stdin.WriteString(text); err != nil {
		return "", g.explain(fmt.Errorf("send %q to the guest: %w", line, err))
	}
	start, _, err := g.waitFor(ctx, from, begin)
	if err != nil {
		return "", err
	}
	stop, _, err := g.waitFor(ctx, start, end)
	if err != nil {
		return "", err
	}
	eol, _, err := g.waitFor(ctx, stop, " >")
	if err != nil {
		return "", err
	}
	out := strings.TrimSpace(strings.ReplaceAll(g.out.slice(start, stop-len(end)), "\r", ""))
	status, err := strconv.Atoi(strings.TrimSpace(g.out.slice(stop, eol-len(" >"))))
	if err != nil || status != 0 {
		return out, fmt.Errorf("in the guest: %q: status %d: %s", line, status, out)
	}
	return out, nil
}

// pair is one guest under ditto and one under QEMU, both running; the one that
// is not measured is idle.
type pair struct {
	cmds   []launch
	guests []*shellGuest
	clean  func() error // may be nil
}

// openPair boots both.
func openPair(ctx context.Context, cmds []launch, clean func() error) (*pair, error) {
	p := &pair{cmds: cmds, clean: clean}
	for _, c := range cmds {
		g, err := startShell(ctx, c.args)
		if err != nil {
			_ = p.Close()
			return nil, fmt.Errorf("%s: %w", c.name, err)
		}
		p.guests = append(p.guests, g)
	}
	return p, nil
}

// Contestants implements [Session].
func (p *pair) Contestants() []Contestant {
	out := make([]Contestant, len(p.cmds))
	for i, c := range p.cmds {
		out[i] = Contestant{Name: c.name, Command: shellLine(c.args)}
	}
	return out
}

// Close implements [Session].
func (p *pair) Close() error {
	for _, g := range p.guests {
		g.stop()
	}
	if p.clean == nil {
		return nil
	}
	return p.clean()
}
