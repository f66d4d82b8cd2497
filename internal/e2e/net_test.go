package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"

	"ditto.vm/internal/labtest"
	"ditto.vm/internal/material"
)

// serve answers HTTP on addr with page until the test ends.
func serve(t testing.TB, addr, page string) (port int) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{
		ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, page)
		}),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
	})
	return l.Addr().(*net.TCPAddr).Port
}

// command runs a program of the host.
func command(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// bridge makes a bridge with an address, which goes with the test.
func bridge(t testing.TB, name, address string) {
	t.Helper()
	_ = exec.Command("ip", "link", "del", name).Run()
	command(t, "ip", "link", "add", name, "type", "bridge")
	t.Cleanup(func() { _ = exec.Command("ip", "link", "del", name).Run() })
	command(t, "ip", "addr", "add", address, "dev", name)
	command(t, "ip", "link", "set", name, "up")
}

// TestLinuxNetworks: one guest with a user-mode network and a tap device on a
// bridge. It fetches a page over each, and is reached through a port forward
// and over the bridge.
func TestLinuxNetworks(t *testing.T) {
	labtest.Need(t)
	k, err := material.Kernel(t.Context(), "6.12", nil)
	if err != nil {
		t.Fatal(err)
	}
	const name = "ditto-e2e0"
	bridge(t, name, "10.77.0.1/24")
	userPort := serve(t, "127.0.0.1:0", "page over the user-mode network\n")
	tapPort := serve(t, "10.77.0.1:0", "page over the bridge\n")
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	forward := free.Addr().(*net.TCPAddr).Port
	if err := free.Close(); err != nil {
		t.Fatal(err)
	}

	m := start(t, environment(t), "run", "-c", "2", "-m", "512M", "--kernel", k.Image,
		"-p", fmt.Sprintf("%d:7000", forward), "--net", "user", "--net", "tap,bridge="+name,
		"--append", "ditto.net=eth0,dhcp ditto.net=eth1,10.77.0.2/24")
	at := m.expect(t, 0, "ditto-init: ready")
	say := func(line string) {
		t.Helper()
		if _, err := m.stdin.WriteString(line + "\r"); err != nil {
			t.Fatal(err)
		}
	}
	// The shell may be there before the address is.
	say(fmt.Sprintf("for i in 1 2 3 4 5 6 7 8 9 10 11 12; do wget -O /tmp/a http://192.168.127.254:%d/ && break; sleep 1; done; cat /tmp/a", userPort))
	at = m.expect(t, at, "page over the user-mode network\r")
	say(fmt.Sprintf("wget -O /tmp/b http://10.77.0.1:%d/ && cat /tmp/b", tapPort))
	at = m.expect(t, at, "page over the bridge\r")

	say("echo hello by the forward | netcat -l 0.0.0.0 7000")
	if got := dialUntil(t, m, fmt.Sprintf("127.0.0.1:%d", forward)); !strings.Contains(got, "hello by the forward") {
		t.Errorf("read %q through the port forward", got)
	}
	say("echo hello by the bridge | netcat -l 0.0.0.0 7001")
	if got := dialUntil(t, m, "10.77.0.2:7001"); !strings.Contains(got, "hello by the bridge") {
		t.Errorf("read %q over the bridge", got)
	}
	say("poweroff")
	if code := m.wait(t); code != 0 {
		t.Errorf("exit code %d:\n%s", code, m)
	}
	if t.Failed() {
		t.Log(m.String()[min(at, len(m.String())):])
	}
}

// dialUntil reads what a listener in the guest sends, once it is there. A
// forward accepts before the guest listens, and then closes without a word.
func dialUntil(t testing.TB, m *machine, addr string) string {
	t.Helper()
	for range 120 {
		select {
		case <-m.done:
			t.Fatalf("the machine ended:\n%s", m)
		case <-time.After(500 * time.Millisecond): // between attempts
		}
		c, err := net.DialTimeout("tcp", addr, 5*time.Second)
		if err != nil {
			continue
		}
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		buf := make([]byte, 64)
		n, _ := c.Read(buf)
		_ = c.Close()
		if n > 0 {
			return string(buf[:n])
		}
	}
	t.Fatalf("nothing listens at %s; console:\n%s", addr, m)
	return ""
}
