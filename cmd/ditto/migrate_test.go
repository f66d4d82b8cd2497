package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/labtest"
	"ditto.vm/vmm/arrival"
)

// hosts are two users' environments that see the same disk.
type hosts struct {
	*saveHome           // the source
	there     *saveHome // the destination
}

func newHosts(t *testing.T, memory, writes string) *hosts {
	t.Helper()
	s := newSaveHome(t, "w", memory, writes)
	return &hosts{s, &saveHome{home: newHome(t), dir: s.dir, disk: s.disk}}
}

// receiver is a running "ditto receive".
type receiver struct {
	t       *testing.T
	cmd     *exec.Cmd
	address string
	events  chan receiveEvent
	errs    *lockedBuffer
}

// receiveEvent is a line that it prints.
type receiveEvent struct {
	Event, Address, Name, Error string
	PID                         int
}

// lockedBuffer keeps what a process prints.
type lockedBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// receive starts a receiver at the destination, and waits until it listens.
func (h *hosts) receive(args ...string) *receiver {
	h.t.Helper()
	cmd := exec.Command(h.path, append([]string{"receive", "--json", "--listen", "127.0.0.1:0"}, args...)...)
	cmd.Env = h.there.env
	r := &receiver{t: h.t, cmd: cmd, events: make(chan receiveEvent, 10_000), errs: &lockedBuffer{}}
	cmd.Stderr = r.errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	go func() {
		defer close(r.events)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var ev receiveEvent
			if json.Unmarshal(lines.Bytes(), &ev) == nil && ev.Event != "progress" {
				r.events <- ev
			}
		}
	}()
	h.t.Cleanup(func() { r.end(unix.SIGKILL) })
	r.address = r.event("listening").Address
	return r
}

// event waits for an event of a kind.
func (r *receiver) event(kind string) receiveEvent {
	r.t.Helper()
	timeout := time.After(time.Minute)
	for {
		select {
		case ev, ok := <-r.events:
			if !ok {
				r.t.Fatalf("the receiver ended without %q: %s", kind, r.errs)
			}
			if ev.Event == kind {
				return ev
			}
		case <-timeout:
			r.t.Fatalf("no event %q: %s", kind, r.errs)
		}
	}
}

// end ends the receiver, and what it waits with.
func (r *receiver) end(signal unix.Signal) {
	if r.cmd.ProcessState == nil {
		_ = r.cmd.Process.Signal(signal)
		_ = r.cmd.Wait() // the signal ends it
	}
}

// migrate moves the machine, which must work.
func (h *hosts) migrate(name, where string, args ...string) string {
	h.t.Helper()
	return h.want(append([]string{"migrate", name, where}, args...)...)
}

// running is the state of a machine, "" if it does not run.
func (s *saveHome) running(name string) string {
	s.t.Helper()
	var rows []struct{ Name, State string }
	if err := json.Unmarshal([]byte(s.want("ps", "--json")), &rows); err != nil {
		s.t.Fatal(err)
	}
	for _, r := range rows {
		if r.Name == name {
			return r.State
		}
	}
	return ""
}

// pki makes certificates and returns the flags that use one.
func (s *saveHome) pki(host string) []string {
	s.t.Helper()
	dir := filepath.Join(s.t.TempDir(), "pki")
	s.want("pki", "init", "--dir", dir)
	s.want("pki", "host", host, "127.0.0.1", "--dir", dir)
	return []string{"--tls-cert", filepath.Join(dir, host+".crt"), "--tls-key", filepath.Join(dir, host+".key"), "--tls-ca", filepath.Join(dir, "ca.crt")}
}

// TestMigrate moves a machine there and back, sandbox and all: it goes on with
// what it had, and each side says where it is.
func TestMigrate(t *testing.T) {
	for name, flags := range map[string][]string{"plain": nil, "tls": {}} {
		t.Run(name, func(t *testing.T) {
			h := newHosts(t, "32M", "size=8M,words=16,order=random,seed=3")
			if flags != nil {
				flags = h.pki("hosta")
			}
			there := h.receive(flags...)
			before := h.writes("w")
			out := h.migrate("w", "tcp://"+there.address, append([]string{"--verify", "--downtime", "1s"}, flags...)...)
			if !strings.Contains(out, "w runs at tcp://"+there.address) || !strings.Contains(out, "32MiB of memory") {
				t.Errorf("%s", out)
			}
			if ev := there.event("arrived"); ev.Name != "w" || ev.PID == 0 {
				t.Errorf("%+v", ev)
			}
			if state := h.running("w"); state != "" {
				t.Errorf("at the source it is %s", state)
			}
			if code, _, errs := h.do("stop", "w"); code != 13 || !strings.Contains(errs, "it went to tcp://"+there.address) {
				t.Errorf("code %d: %s", code, errs)
			}
			if now := h.there.writes("w"); now < before {
				t.Errorf("it has forgotten what it wrote: %d, %d before", now, before)
			}
			// Back, by the same words the other way round.
			back := &hosts{h.there, h.saveHome}
			here := back.receive(append([]string{"--once"}, flags...)...)
			back.migrate("w", "tcp://"+here.address, append([]string{"--compress", "zstd", "--proof", "blake3", "--downtime", "1s"}, flags...)...)
			here.event("arrived")
			if err := here.cmd.Wait(); err != nil {
				t.Errorf("a receiver that is to receive once: %v: %s", err, here.errs)
			}
			h.writes("w")
			h.finish("w")
			h.nothingLeft()
			h.there.nothingLeft()
			there.end(unix.SIGTERM)
			if errs := there.errs.String(); errs != "" {
				t.Errorf("the receiver said: %s", errs)
			}
		})
	}
}

// TestMigratePostcopy: the guest runs early, and the source ends when the last
// page has followed.
func TestMigratePostcopy(t *testing.T) {
	if err := arrival.CanFetch(); err != nil {
		if os.Getenv("DITTO_REQUIRE_KVM") != "" {
			t.Fatal(err)
		}
		t.Skipf("%v; try: chmod 666 /dev/userfaultfd", err)
	}
	h := newHosts(t, "64M", "size=48M,words=512,order=random,seed=12")
	r := h.receive()
	out := h.migrate("w", "tcp://"+r.address, "--postcopy", "--downtime", "1ms", "--no-throttle", "--json")
	if !strings.Contains(out, `"phase":"pull"`) || !strings.Contains(out, `"mode":"postcopy"`) {
		t.Errorf("it was not post-copy: %s", out)
	}
	r.event("arrived")
	h.there.writes("w")
	h.there.finish("w")
	h.nothingLeft()
	h.there.nothingLeft()
}

// TestMigrateSSH: a program in the place of ssh runs the other side.
func TestMigrateSSH(t *testing.T) {
	h := newHosts(t, "32M", "size=8M,words=16,order=random,seed=4")
	ssh := filepath.Join(t.TempDir(), "ssh")
	script := fmt.Sprintf("#!/bin/sh\nfor last; do :; done\nexport XDG_RUNTIME_DIR='%s' XDG_STATE_HOME='%s'\nPATH='%s':$PATH\ncat | eval \"$last\" | cat\n",
		h.there.runDir, h.there.state, filepath.Dir(h.path))
	if err := os.WriteFile(ssh, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	code, out, errs := h.do("migrate", "w", "ssh://hostb", "--ssh", ssh, "--receive=--name=w2", "--downtime", "1s")
	if code != 0 || !strings.Contains(out, "w runs at ssh://hostb") || !strings.Contains(errs, "w2 has arrived") {
		t.Fatalf("code %d: %s%s", code, out, errs)
	}
	h.there.writes("w2")
	h.there.finish("w2")
	h.nothingLeft()
	h.there.nothingLeft()
}

// TestMigrateRefused: what does not fit is told on both sides, the machine runs
// where it ran, and the receiver goes on.
func TestMigrateRefused(t *testing.T) {
	h := newHosts(t, "32M", "size=8M,words=16,order=random,seed=5")
	ours, theirs := h.pki("hosta"), h.pki("hosta")
	small := filepath.Join(t.TempDir(), "small.img")
	if err := os.WriteFile(small, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	h.there.want("run", "-d", "--name", "taken", "--kernel", "payload:memwriter:size=1M,words=16,order=random,seed=8", "--net", "none", "--memory", "16M")
	defer h.there.finish("taken")
	for name, test := range map[string]struct {
		receive, migrate []string
		code             int
		want             string // at the source
		there            string // at the destination
	}{
		"name":         {[]string{"--name", "taken"}, nil, 18, "a machine of that name is running", "a machine of that name is running"},
		"no disk":      {[]string{"--disk", "0=/absent.img"}, nil, 18, "/absent.img", "/absent.img"},
		"another disk": {[]string{"--disk", "0=" + small}, nil, 18, "share it, or have it copied", "share it, or have it copied"},
		"too many":     {[]string{"--disk", "1=" + small}, nil, 18, "the machine has 1 disks", "the machine has 1 disks"},
		"wrong CA":     {ours, theirs, 18, "not signed by an authority of --tls-ca", "refuses this host's certificate"},
		"no TLS there": {nil, ours, 18, "TLS", ""},
		"no TLS here":  {ours, nil, 18, "", "does not speak TLS"},
	} {
		t.Run(name, func(t *testing.T) {
			r := h.receive(test.receive...)
			code, out, errs := h.do(append([]string{"migrate", "w", "tcp://" + r.address}, test.migrate...)...)
			if code != test.code || !strings.Contains(errs, test.want) || !strings.Contains(errs, "runs on here") || out != "" {
				t.Errorf("code %d, want %d; %q, want %q; output %q", code, test.code, errs, test.want, out)
			}
			if state := h.running("w"); state != "running" {
				t.Errorf("it is %q", state)
			}
			r.hears(test.there)
			r.end(unix.SIGTERM)
			if state := h.there.running("w"); state != "" {
				t.Errorf("at the destination it is %s", state)
			}
		})
	}
	h.writes("w")
	h.finish("w")
}

// netd builds the user-mode network beside ditto.
var netd = sync.OnceValue(func() error {
	path, err := binary()
	if err != nil {
		return err
	}
	cmd := exec.Command("go", "build", "-o", filepath.Join(filepath.Dir(path), "ditto-netd"), "../ditto-netd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
})

// freePort is one that nobody listens on.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return fmt.Sprint(l.Addr().(*net.TCPAddr).Port)
}

// TestMigrateForwards: a machine's port forwards are those of its new host, and
// one that cannot be had there is told before memory moves.
func TestMigrateForwards(t *testing.T) {
	requireKVM(t)
	if err := netd(); err != nil {
		t.Fatal(err)
	}
	h := newHosts(t, "32M", "size=8M,words=16,order=random,seed=8")
	defer h.finish("w")
	first, second := freePort(t), freePort(t)
	h.want("run", "-d", "--name", "net", "--kernel", "payload:memwriter:size=4M,words=16,order=random,seed=9", "--net", "user", "-p", first+":80", "--memory", "16M")
	r := h.receive()
	code, out, errs := h.do("migrate", "net", "tcp://"+r.address)
	if code != 18 || !strings.Contains(errs, first) || !strings.Contains(errs, "say other ports with -p") || out != "" {
		t.Errorf("code %d: %s%s", code, out, errs)
	}
	r.event("failed")
	r.end(unix.SIGTERM)
	reached := func(port string) bool {
		c, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	}
	if !reached(first) {
		t.Error("the forward at the source is gone")
	}
	r = h.receive("-p", second+":80")
	h.migrate("net", "tcp://"+r.address, "--downtime", "1s")
	if reached(first) || !reached(second) {
		t.Errorf("the old forward leads somewhere: %v, the new one: %v", reached(first), reached(second))
	}
	h.there.writes("net")
	h.there.finish("net")
	h.there.nothingLeft()
}

// hears waits until the receiver has said something, in an event or in its log.
func (r *receiver) hears(want string) {
	r.t.Helper()
	var seen []receiveEvent
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		for len(r.events) > 0 {
			seen = append(seen, <-r.events)
		}
		if strings.Contains(r.errs.String(), want) || strings.Contains(fmt.Sprintf("%+v", seen), want) {
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("the receiver says nothing of %q: %+v, %s", want, seen, r.errs)
		}
	}
}

// TestMigrateCanceled: Ctrl-C leaves the machine where it is, and a second try
// works.
func TestMigrateCanceled(t *testing.T) {
	h := newHosts(t, "64M", "size=48M,words=512,order=random,seed=6")
	r := h.receive()
	for _, signal := range []unix.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGKILL} {
		cmd := exec.Command(h.path, "migrate", "w", "tcp://"+r.address, "--json", "--bandwidth", "2M", "--no-throttle")
		cmd.Env = h.env
		var errs bytes.Buffer
		cmd.Stderr = &errs
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for lines.Scan() && !strings.Contains(lines.Text(), `"phase":"copy"`) {
		}
		if state := h.running("w"); state != "migrating" {
			t.Errorf("it is %q", state)
		}
		if state := h.there.running("w"); state != "incoming" {
			t.Errorf("at the destination it is %q", state)
		}
		if err := cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() {
		}
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) {
			t.Fatalf("%v was too late: %v", signal, err)
		}
		if signal != unix.SIGKILL && (exit.ExitCode() != 1 || errs.String() != "ditto: interrupted: w runs on here\n") {
			t.Errorf("%v: code %d: %s", signal, exit.ExitCode(), &errs)
		}
		r.event("failed")
		for deadline := time.Now().Add(time.Minute); h.running("w") != "running"; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%v: it is %q", signal, h.running("w"))
			}
		}
	}
	h.migrate("w", "tcp://"+r.address, "--downtime", "5s")
	h.there.writes("w")
	h.there.finish("w")
}

// TestReceiverStrangers: who is no source costs the receiver nothing.
func TestReceiverStrangers(t *testing.T) {
	for name, flags := range map[string][]string{"plain": nil, "tls": {}} {
		t.Run(name, func(t *testing.T) {
			h := newHosts(t, "32M", "size=8M,words=16,order=random,seed=7")
			if flags != nil {
				flags = h.pki("hosta")
			}
			r := h.receive(flags...)
			for i := range 200 {
				c, err := net.Dial("tcp", r.address)
				if err != nil {
					t.Fatal(err)
				}
				switch i % 4 {
				case 0: // a port scanner
				case 1:
					_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
				case 2:
					garbage := make([]byte, 4096)
					for j := range garbage {
						garbage[j] = byte(rand.Uint32())
					}
					_, _ = c.Write(garbage)
				case 3:
					if i < 40 { // they stay, and say nothing
						defer c.Close()
						continue
					}
				}
				_ = c.Close()
			}
			h.migrate("w", "tcp://"+r.address, append([]string{"--downtime", "1s"}, flags...)...)
			r.event("arrived")
			h.there.writes("w")
			h.there.finish("w")
		})
	}
}

// TestMigrateKilled kills one of the processes of a migration when it is in one
// of its phases: of those that are left exactly one runs the machine, and it is
// what it was.
func TestMigrateKilled(t *testing.T) {
	phases := []string{"connect", "copy", "stop", "commit"}
	rounds := labtest.Count(1, 10)
	where := map[string]int{}
	kills := 0
	for range rounds {
		for _, victim := range []string{"client", "waiting", "receiving", "source"} {
			for _, phase := range phases {
				k := &cut{hosts: newHosts(t, "32M", fmt.Sprintf("size=16M,words=512,order=random,seed=%d", kills+10)), victim: victim}
				where[victim+" in "+phase+": "+k.in(phase)]++
				k.nothingLeft()
				k.there.nothingLeft()
				kills++
			}
		}
	}
	t.Logf("%v", where)
	if !t.Failed() {
		labtest.Proof(t, "migrate-killed", "source, destination, receiver or client of a migration killed in each of its phases, %d times: never two machines, and one unless the one that had it was killed: %v", kills, where)
	}
}

// cut is one migration that is cut short.
type cut struct {
	*hosts
	victim string
	r      *receiver
}

// child is the machine's process that a process has started.
func child(t *testing.T, pid int) int {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if child := machineChild(pid); child != 0 {
			return child
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d starts none", pid)
		}
	}
}

// machineChild is the machine's process among those that a process has started, 0
// if there is none yet.
func machineChild(pid int) int {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid)) // the pattern is right
	for _, path := range tasks {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // the thread has ended
		}
		for _, word := range strings.Fields(string(text)) {
			child, err := strconv.Atoi(word)
			if err != nil {
				continue
			}
			// Package os forks to find out what the kernel can do.
			if words, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", child)); err == nil && strings.Contains(string(words), "__machine") {
				return child
			}
		}
	}
	return 0
}

// in kills the victim in a phase, and returns where the machine is.
func (k *cut) in(phase string) string {
	k.t.Helper()
	source := k.pid("w")
	k.r = k.receive()
	receiving := child(k.t, k.r.cmd.Process.Pid)
	client := exec.Command(k.path, "migrate", "w", "tcp://"+k.r.address, "--bandwidth", "100M", "--json")
	client.Env = k.env
	errs := &lockedBuffer{}
	client.Stderr = errs
	out, err := client.StdoutPipe()
	if err != nil {
		k.t.Fatal(err)
	}
	if err := client.Start(); err != nil {
		k.t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() && !strings.Contains(lines.Text(), `"phase":"`+phase+`"`) {
	}
	time.Sleep(rand.N(2 * time.Millisecond)) // any point of it will do
	pid := map[string]int{"client": client.Process.Pid, "waiting": k.r.cmd.Process.Pid, "receiving": receiving, "source": source}[k.victim]
	if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		k.t.Fatal(err)
	}
	for lines.Scan() {
	}
	_ = client.Wait() // it may have failed
	if k.victim == "waiting" {
		_ = k.r.cmd.Wait()
	}
	return k.settle(errs.String())
}

// settle waits until it is decided where the machine is, and lets it end.
func (k *cut) settle(errs string) string {
	k.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		here, there := k.running("w"), k.there.running("w")
		switch {
		case here == "running" && there == "running":
			k.t.Fatalf("%s: it runs twice", k.victim)
		case here == "running" && there == "":
			k.writes("w")
			k.finish("w")
			return "here"
		case here == "" && there == "running":
			k.there.writes("w")
			k.there.finish("w")
			return "there"
		case here == "" && there == "" && k.victim == "source":
			return "nowhere"
		case here == "" && there == "" && k.victim == "receiving":
			// It was there already when that was killed.
			if code, _, errs := k.do("stop", "w"); code != 13 || !strings.Contains(errs, "it went to") {
				k.t.Fatalf("code %d: %s", code, errs)
			}
			return "nowhere"
		}
		if time.Now().After(deadline) {
			k.t.Fatalf("%s: here it is %q, there %q: %s%s", k.victim, here, there, errs, k.r.errs)
		}
	}
}
