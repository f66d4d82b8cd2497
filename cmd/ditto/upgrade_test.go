package main

import (
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/labtest"
)

// TestUpgrade hands a machine to other processes under its name, again and again: it
// goes on with the memory that it has, shared or copied, and ends well.
func TestUpgrade(t *testing.T) {
	for name, test := range map[string]struct{ memory, want string }{
		"shared": {"32M,memfd", "shared, and none of it copied"},
		"copied": {"32M", "of memory copied"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSaveHome(t, "w", test.memory, "size=8M,words=16,order=random,seed=3")
			before := s.writes("w")
			for range 3 {
				code, out, errs := s.do("upgrade", "w")
				if code != 0 || !strings.Contains(out, test.want) {
					t.Fatalf("code %d: %s%s", code, out, errs)
				}
				if state := s.running("w"); state != "running" {
					t.Errorf("it is %q", state)
				}
				now := s.writes("w")
				if now < before {
					t.Errorf("it has forgotten what it wrote: %d, %d before", now, before)
				}
				before = now
			}
			s.finish("w")
			s.nothingLeft()
		})
	}
}

// TestUpgradeKilled kills the client, or the process that has the machine, or the
// one that takes it over, at many moments of an upgrade: never do two of them go on
// with it, and one does unless the one that had it was killed.
func TestUpgradeKilled(t *testing.T) {
	const machine = "size=8M,words=16,order=random,seed=3"
	s := newSaveHome(t, "w", "32M,memfd", machine)
	began := time.Now()
	s.want("upgrade", "w")
	took := time.Since(began)
	s.finish("w")

	rounds, kills := labtest.Count(4, 60), 0
	where := map[string]int{}
	for i := range rounds {
		for _, victim := range []string{"client", "old", "new"} {
			u := &upgradeCut{saveHome: newSaveHome(t, "w", "32M,memfd", machine), victim: victim}
			delay := rand.N(took)
			if i == 0 {
				delay = 0 // when the new one has hardly begun
			}
			where[victim+" killed: "+u.after(delay)]++
			u.nothingLeft()
			kills++
		}
	}
	t.Logf("%v", where)
	if !t.Failed() {
		labtest.Proof(t, "upgrade-killed", "client, old or new process of an upgrade killed at a random moment of it, %d times: never two machines, and one unless the one that had it was killed: %v", kills, where)
	}
}

// upgradeCut is one upgrade that is cut short.
type upgradeCut struct {
	*saveHome
	victim string
}

// after kills the victim some time after the beginning, and returns which process
// has the machine then.
func (u *upgradeCut) after(delay time.Duration) string {
	u.t.Helper()
	pids := map[string]int{"old": u.pid("w")}
	client := exec.Command(u.path, "upgrade", "w")
	client.Env = u.env
	client.Stdout, client.Stderr = io.Discard, &lockedBuffer{}
	if err := client.Start(); err != nil {
		u.t.Fatal(err)
	}
	pids["client"] = client.Process.Pid
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = client.Wait() // it may have failed
	}()
	timer := time.After(delay)
	if u.victim != "client" {
		pids["new"] = startedBy(client.Process.Pid, ended)
	}
	<-timer
	if pid := pids[u.victim]; pid != 0 {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			u.t.Fatal(err)
		}
	}
	select {
	case <-ended:
	case <-time.After(2 * time.Minute):
		_ = client.Process.Kill()
		u.t.Fatalf("%s killed after %s: the client does not end: %s", u.victim, delay, client.Stderr)
	}
	return u.settle(pids)
}

// startedBy returns the machine's process that a process has started, 0 if it ended
// before that was seen.
func startedBy(pid int, ended <-chan struct{}) int {
	for {
		if child := machineChild(pid); child != 0 {
			return child
		}
		select {
		case <-ended:
			return 0
		case <-time.After(time.Millisecond):
		}
	}
}

// settle waits until it is decided who has the machine, and lets it end.
func (u *upgradeCut) settle(pids map[string]int) string {
	u.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		switch state := u.running("w"); {
		case state == "running" && (!alive(pids["old"]) || !alive(pids["new"])):
			who := "the new one has it"
			if u.pid("w") == pids["old"] {
				who = "the old one has it"
			}
			u.writes("w")
			u.finish("w")
			return who
		case state == "" && !alive(pids["old"]) && !alive(pids["new"]):
			// Right if the one that is killed had it: the new one once it has committed.
			if committed := u.committed(); u.victim == "client" || committed != (u.victim == "new") {
				u.t.Fatalf("%s killed: the machine is lost, committed: %t", u.victim, committed)
			}
			return "nobody has it"
		}
		if time.Now().After(deadline) {
			u.t.Fatalf("%s killed: the machine is %q, the old process lives: %t, the new one: %t", u.victim, u.running("w"), alive(pids["old"]), alive(pids["new"]))
		}
	}
}

// committed reports whether the new process has taken the machine over, as it
// writes down for those who ask later.
func (u *upgradeCut) committed() bool {
	u.t.Helper()
	outcomes, err := filepath.Glob(filepath.Join(u.runDir, "ditto", ".migrations", "*"))
	if err != nil {
		u.t.Fatal(err)
	}
	for _, path := range outcomes {
		text, err := os.ReadFile(path)
		if err != nil {
			u.t.Fatal(err)
		}
		if strings.HasPrefix(string(text), "committed") {
			return true
		}
	}
	return false
}

// alive reports whether a process runs.
func alive(pid int) bool { return pid != 0 && unix.Kill(pid, 0) == nil }
