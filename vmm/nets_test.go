package vmm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"ditto.vm/vmm/config"
)

// fakeNetd puts a program in the place of ditto-netd.
func fakeNetd(t *testing.T, script string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "ditto-netd"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// The guest does not wait for a user-mode network, but it does not run on
// without one either.
func TestNetdThatFailsEndsTheMachine(t *testing.T) {
	fakeNetd(t, "exit 1")
	c := payloadConfig("spin")
	c.Nets = []config.Net{{Mode: config.NetUser}, {Mode: config.NetUser}}
	m := newVM(t, c, newConsole())
	ctx := deadline(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	exit, err := m.Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var failure *NetError
	if exit.Reason != ExitFailed || !errors.As(exit.Err, &failure) {
		t.Errorf("exit %+v, want a failed network", exit)
	}
}

// A machine that is never started leaves nothing of its networks behind,
// whether they come up or not (goleak looks).
func TestNetdOfMachineThatIsNotStarted(t *testing.T) {
	for _, script := range []string{"exit 1", `echo '{"ready":true}' >&4; exec cat <&3 >&2`} {
		fakeNetd(t, script)
		c := payloadConfig("spin")
		c.Nets = []config.Net{{Mode: config.NetUser}, {Mode: config.NetUser}}
		newVM(t, c, newConsole())
	}
}

// With forwards the machine is not there before they are.
func TestForwardsAreAwaited(t *testing.T) {
	fakeNetd(t, "exit 1")
	requireKVM(t)
	c := payloadConfig("spin")
	c.Nets = []config.Net{{Mode: config.NetUser, Forwards: []config.Forward{{Protocol: "tcp", HostPort: 0, GuestPort: 80}}}}
	m, err := New(context.Background(), c, Options{Console: newConsole()})
	var failure *NetError
	if !errors.As(err, &failure) {
		t.Fatalf("machine %v, error %v, want a failed network", m, err)
	}
}
