package e2e

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"ditto.vm/internal/labtest"
	"ditto.vm/internal/material"
)

// The bridge and the guest that is saved under load.
const (
	loadBridge  = "ditto-e2e1"
	loadHost    = "10.78.0.1"
	loadGuest   = "10.78.0.2"
	counterPort = "7000" // of testdata/load.sh
)

// counting is a connection into the guest, over which its counter is asked again
// and again.
type counting struct {
	conn net.Conn
	in   *bufio.Reader

	nonce string
	count uint64
}

// ask asks once. Whatever happens to the guest meanwhile, the answer is the next
// number, and comes over the same connection.
func (c *counting) ask(ctx context.Context) error {
	if deadline, ok := ctx.Deadline(); ok {
		_ = c.conn.SetDeadline(deadline)
	}
	if _, err := c.conn.Write([]byte("next\n")); err != nil {
		return err
	}
	line, err := c.in.ReadString('\n')
	if err != nil {
		return err
	}
	nonce, number, _ := strings.Cut(strings.TrimSpace(line), " ")
	n, err := strconv.ParseUint(number, 10, 64)
	switch {
	case err != nil:
		return err
	case c.nonce != "" && nonce != c.nonce:
		return fmt.Errorf("the guest's nonce was %s and is %s", c.nonce, nonce)
	case n != c.count+1:
		return fmt.Errorf("the guest counts %d after %d", n, c.count)
	}
	c.nonce, c.count = nonce, n
	return nil
}

// keepCounting asks until it is stopped, which returns how it went.
func (c *counting) keepCounting(ctx context.Context) (stop func() error) {
	ctx, cancel := context.WithTimeout(ctx, guestLimit)
	ended := make(chan struct{})
	var err error
	var once sync.Once
	over := make(chan struct{})
	go func() {
		defer close(ended)
		for err == nil {
			select {
			case <-over:
				return
			case <-time.After(20 * time.Millisecond): // not all of the guest's time
			}
			err = c.ask(ctx)
		}
	}()
	return func() error {
		once.Do(func() { close(over) })
		<-ended
		cancel()
		return err
	}
}

// loaded is a guest under load, and the host's ends of its connections.
type loaded struct {
	folders
	*shell
	counter *counting
	iperf   *transcript // of the client
}

func (l *loaded) restarted(m *machine) { l.shell = &shell{t: l.folders.t, machine: m} }

// progress is how far the loads are.
type progress struct{ fio, stress, intervals int }

var roundsLine = regexp.MustCompile(`rounds (\d+) (\d+)`)

// progress asks the guest, and fails when a load has found something wrong.
func (l *loaded) progress() progress {
	t := l.folders.t
	t.Helper()
	out := l.do(`echo "rounds $(cat fio.rounds) $(cat stress.rounds)"; cat wrong`)
	m := roundsLine.FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no rounds in %q", out)
	}
	if rest := out[strings.Index(out, m[0])+len(m[0]):]; strings.Contains(rest, "fio:") || strings.Contains(rest, "stress:") {
		t.Fatalf("a load found something wrong: %s", rest)
	}
	p := progress{intervals: l.intervals()}
	p.fio, _ = strconv.Atoi(m[1])
	p.stress, _ = strconv.Atoi(m[2])
	return p
}

// goesOn waits until every load has done another round.
func (l *loaded) goesOn() {
	t := l.folders.t
	t.Helper()
	deadline := time.Now().Add(guestLimit)
	from := l.progress()
	for {
		p := l.progress()
		if p.fio > from.fio && p.stress > from.stress && p.intervals > from.intervals {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("a load does not go on: %+v, and before %+v:\n%s\n%s", p, from, l.do("tail -n 5 *.out"), l.iperf)
		}
		time.Sleep(2 * time.Second) // the guest is busy
	}
}

// intervals counts those in which iperf3's client sent something.
func (l *loaded) intervals() (n int) {
	for line := range strings.Lines(l.iperf.String()) {
		if strings.Contains(line, "Bytes") && !strings.Contains(line, " 0.00 Bytes") {
			n++
		}
	}
	return n
}

// startLoad boots a Debian guest and puts it under load.
func startLoad(t *testing.T) *loaded {
	t.Helper()
	k, err := material.Kernel(t.Context(), material.CloudKernel, nil)
	if err != nil {
		t.Fatal(err)
	}
	image, err := material.Debian(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	bridge(t, loadBridge, loadHost+"/24")
	l := &loaded{folders: newFolders(t), iperf: newTranscript()}
	disk := l.path("root.img")
	command(t, "cp", "--sparse=always", image.Path, disk)
	command(t, "debugfs", "-w", "-R", "write testdata/load.sh /load.sh", disk)
	command(t, "debugfs", "-w", "-R", "set_inode_field /load.sh mode 0100755", disk)
	l.restarted(start(t, l.env, "run", "--name", "web", "-c", "2", "-m", "320M", "--net", "tap,bridge="+loadBridge,
		"--kernel", k.Image, "--disk", disk, "--append", "root=LABEL=rootfs init=/load.sh ditto.net=off ADDRESS="+loadGuest+"/24"))
	l.at = l.expect(t, 0, "# ")
	conn := l.dial(loadGuest + ":" + counterPort)
	t.Cleanup(func() { _ = conn.Close() })
	l.counter = &counting{conn: conn, in: bufio.NewReader(conn)}
	if err := l.counter.ask(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.startIperf()
	return l
}

// dial connects to a port of the guest as soon as it listens.
func (l *loaded) dial(address string) net.Conn {
	t := l.folders.t
	t.Helper()
	for deadline := time.Now().Add(guestLimit); ; {
		conn, err := net.DialTimeout("tcp", address, 5*time.Second)
		if err == nil {
			return conn
		}
		if time.Now().After(deadline) {
			t.Fatalf("%v; console:\n%s\n%s", err, l, l.do("cat *.out; ip addr"))
		}
		time.Sleep(200 * time.Millisecond) // between attempts
	}
}

// startIperf sends to the guest until the test ends, a moderate amount. The guest
// may not listen yet.
func (l *loaded) startIperf() {
	t := l.folders.t
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{}, 1)
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	for deadline := time.Now().Add(guestLimit); time.Now().Before(deadline); {
		cmd := exec.CommandContext(ctx, "iperf3", "-c", loadGuest, "-t", "7200", "-i", "1", "-b", "4M", "--forceflush")
		cmd.Stdout, cmd.Stderr = l.iperf, l.iperf
		if err := cmd.Start(); err != nil {
			ended <- struct{}{}
			t.Fatal(err)
		}
		go func() {
			_ = cmd.Wait() // what it said tells whether it went on
			ended <- struct{}{}
		}()
		for l.intervals() == 0 {
			select {
			case <-l.iperf.more:
				continue
			case <-ended:
			}
			break
		}
		if l.intervals() > 0 {
			return
		}
		time.Sleep(500 * time.Millisecond) // between attempts
	}
	ended <- struct{}{}
	t.Fatalf("iperf3: %s\n%s", l.iperf, l.do("cat iperf.out"))
}

// finish ends the loads, looks at what they say, and switches the guest off.
func (l *loaded) finish() {
	t := l.folders.t
	t.Helper()
	l.do("touch stop; until [ -e fio.done ] && [ -e stress.done ]; do sleep 0.2; done")
	l.progress()
	l.do("sync; mount -o remount,ro / || echo busy")
	l.write("poweroff -ff\r")
	if code := l.wait(t); code != 0 {
		t.Errorf("exit code %d:\n%s", code, l)
	}
}

// TestLinuxSnapshotUnderLoad saves a Debian guest again and again while fio
// writes and verifies, iperf3 receives over tap and stress-ng checks memory, and
// restores it each time. Its connections and its work go on as if nothing had
// been, and its file system is whole.
func TestLinuxSnapshotUnderLoad(t *testing.T) {
	labtest.Need(t)
	l := startLoad(t)
	id := l.sums("cat /proc/sys/kernel/random/boot_id")
	if id == "" {
		t.Fatalf("no boot_id:\n%s", l)
	}
	l.goesOn()
	stop := l.counter.keepCounting(t.Context())
	t.Cleanup(func() { _ = stop() })
	rounds := labtest.Count(1, 10)
	overlay := ""
	for i := range rounds {
		snap := l.path(fmt.Sprintf("snap%d", i))
		args := []string{"--stop"}
		if i%2 == 1 {
			args = append(args, "--compress", "zstd")
		}
		l.save("web", snap, args...)
		if code := l.wait(t); code != 0 {
			t.Fatalf("exit code %d:\n%s", code, l)
		}
		restore := []string{"restore", snap, "--overlay-dir", l.path(fmt.Sprintf("overlays%d", i))}
		if i%3 == 2 {
			restore = append(restore, "--eager")
		}
		l.restarted(start(t, l.env, restore...))
		overlay = filepath.Join(l.path(fmt.Sprintf("overlays%d", i)), "web", "blk0.qcow2")
		l.write("\r")
		if got := l.sums("cat /proc/sys/kernel/random/boot_id"); got != id {
			t.Fatalf("boot_id is %s, want %s:\n%s", got, id, l)
		}
		l.goesOn()
	}
	if err := stop(); err != nil {
		t.Errorf("the connection: %v", err)
	}
	l.finish()
	checkDisk(t, overlay)
	if !t.Failed() {
		labtest.Proof(t, "snapshot-load", "a guest saved and restored %d times while fio writes and verifies, iperf3 receives and stress-ng checks memory: no load finds a fault, one connection counts to %d without a gap, %d intervals of iperf3, the same boot_id and nonce, e2fsck and qemu-img find nothing",
			rounds, l.counter.count, l.intervals())
	}
}
