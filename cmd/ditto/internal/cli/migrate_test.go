package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/vmproc"
	"ditto.vm/migration/live"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/lend"
	"ditto.vm/vmm/lend/remotemigrate"
)

func TestParseDestination(t *testing.T) {
	for _, test := range []struct {
		text    string
		receive []string
		address string
		ssh     string
		want    string // in the error
	}{
		{text: "tcp://b", address: "b:7788"},
		{text: "tcp://b/", address: "b:7788"},
		{text: "tcp://10.0.0.1:99", address: "10.0.0.1:99"},
		{text: "tcp://[::1]:99", address: "[::1]:99"},
		{text: "ssh://b", ssh: "ssh|-T|b|ditto receive --stdio"},
		{text: "ssh://root@b:2222/opt/ditto", ssh: "ssh|-T|-p|2222|-l|root|b|'/opt/ditto' receive --stdio"},
		{text: "ssh://b", receive: []string{"--disk=0=/a b", "-p", "8081:80"}, ssh: "ssh|-T|b|ditto receive --stdio '--disk=0=/a b' -p '8081:80'"},
		{text: "b", want: "how to get there is missing"},
		{text: "http://b", want: "how to get there is missing"},
		{text: "tcp://", want: "no host"},
		{text: "tcp://:99", want: "no host"},
		{text: "tcp://b/x", want: "more than a host and a port"},
		{text: "tcp://u@b", want: "more than a host and a port"},
		{text: "tcp://b?x=1", want: "no host"},
		{text: "tcp://b:x", want: "no address"},
		{text: "tcp://b", receive: []string{"-p"}, want: "--receive is for ssh://"},
		{text: "ssh://u:secret@b", want: "a password does not belong there"},
		{text: "ssh://-oProxyCommand=x", want: "begins with -"},
		{text: "ssh://-x@b", want: "begins with -"},
	} {
		d, err := parseDestination(test.text, "ssh", test.receive)
		if (err == nil) != (test.want == "") || err != nil && (!strings.Contains(err.Error(), test.want) || vmproc.Classify(err) != exit.Usage) {
			t.Errorf("%s: %v, want %q", test.text, err, test.want)
			continue
		}
		if d.address != test.address || strings.Join(d.ssh, "|") != test.ssh {
			t.Errorf("%s %v: %q, %q", test.text, test.receive, d.address, strings.Join(d.ssh, "|"))
		}
	}
}

// moved is a fake migration that ends well.
func moved(_ context.Context, m *fakeMachine, _ func(context.Context, bool) (net.Conn, error), o live.Options) (live.Report, error) {
	o.Events(live.Event{Phase: live.PhaseCopy, Round: 1, Done: 1 << 20, Total: 4 << 20, Sent: live.Traffic{Total: 5 << 20}})
	m.end <- vmproc.Exit{Reason: "migrated", Where: o.Where}
	return live.Report{
		Outcome: live.OutcomeCommitted, Where: o.Where, RAM: 512 << 20, Total: 1500 * time.Millisecond, Downtime: 12 * time.Millisecond,
		Sent: live.Traffic{Total: 41 << 20}, Pages: live.Pages{Zero: 256, Named: 512, Raw: 3},
	}, nil
}

// TestMigrate: what is asked for arrives, and what became of it is told.
func TestMigrate(t *testing.T) {
	h := newHost(t)
	var got live.Options
	h.move = func(ctx context.Context, m *fakeMachine, dial func(context.Context, bool) (net.Conn, error), o live.Options) (live.Report, error) {
		got = o
		return moved(ctx, m, dial, o)
	}
	done := h.start("web")
	out := h.want("migrate", "web", "tcp://127.0.0.1:9", "--downtime", "50ms", "--bandwidth", "10M", "--timeout", "2m", "--on-timeout", "stop",
		"--connections", "2", "--compress", "zstd", "--proof", "blake3", "--postcopy", "--no-names", "--no-throttle", "--verify")
	if code := <-done; code != exit.OK {
		t.Errorf("code %d", code)
	}
	for _, want := range []string{"web runs at tcp://127.0.0.1:9: 512MiB of memory in 1.5s, 41MiB sent; it stood still for 12ms", "1MiB zero, 2MiB by name, 12KiB as bytes"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in %s", want, out)
		}
	}
	got.Events, got.Log = nil, nil
	want := live.Options{
		Connections: 2, NoNames: true, Proof: live.ProofBLAKE3, Compression: live.Zstd, Bandwidth: 10 << 20,
		Downtime: 50 * time.Millisecond, Timeout: 2 * time.Minute, OnTimeout: live.TimeoutStop, NoThrottle: true, Postcopy: true,
		Verify: true, Where: "tcp://127.0.0.1:9",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if code, _, errs := h.do("console", "web"); code != exit.NotFound || !strings.Contains(errs, "web does not run here: it went to tcp://127.0.0.1:9") {
		t.Errorf("code %d: %s", code, errs)
	}

	h.move = moved
	done = h.start("web")
	lines := strings.Split(strings.TrimSpace(h.want("migrate", "web", "tcp://127.0.0.1:9", "--json")), "\n")
	<-done
	var progress struct {
		Event, Phase string
		Done         uint64
	}
	var result struct {
		Event, Name, Where, Outcome string
		RAM                         uint64
	}
	if err := errors.Join(json.Unmarshal([]byte(lines[0]), &progress), json.Unmarshal([]byte(lines[len(lines)-1]), &result)); err != nil {
		t.Fatal(err)
	}
	if progress.Event != "progress" || progress.Phase != "copy" || progress.Done != 1<<20 || result.Event != "migrated" || result.Name != "web" || result.RAM != 512<<20 || result.Outcome != "committed" {
		t.Errorf("%+v, %+v", progress, result)
	}
}

// TestMigrateErrors: each has its code, and says where the machine is.
func TestMigrateErrors(t *testing.T) {
	h := newHost(t)
	h.move = h.failing
	done := h.start("web")
	credentials := h.pki("a")
	for _, test := range []struct {
		err  error
		args []string
		code int
		want string
	}{
		{errors.New("no room"), nil, exit.Migration, "web is not migrated, and runs on here: no room"},
		{&live.PeerError{Refused: true, Reason: "no such disk"}, nil, exit.Migration, "the other side refused: no such disk"},
		{&live.InDoubtError{Err: errors.New("cut")}, nil, exit.InDoubt, "ditto resume --take-back web"},
		{&live.StuckError{Err: errors.New("cut"), Cause: errors.New("locked")}, nil, exit.InDoubt, "it runs nowhere else"},
		{remotemigrate.ErrBusy, nil, exit.Migration, "under way"},
		{nil, []string{"--bandwidth", "fast"}, exit.Usage, "--bandwidth"},
		{nil, []string{"--downtime", "0s"}, exit.Usage, "--downtime"},
		{nil, []string{"--on-timeout", "panic"}, exit.Usage, "use abort, stop or postcopy"},
		{nil, []string{"--compress", "lz4"}, exit.Usage, "use none or zstd"},
		{nil, []string{"--proof", "md5"}, exit.Usage, "use xxh3 or blake3"},
		{nil, []string{"--connections", "99"}, exit.Usage, "use 0 to 64"},
		{nil, []string{"--tls-cert", "x"}, exit.Usage, "they must all be set"},
		{nil, []string{"--tls-server-name", "x"}, exit.Usage, "needs --tls-cert"},
		{nil, []string{"--tls-cert", "/absent", "--tls-key", "/absent", "--tls-ca", "/absent"}, exit.Usage, "/absent"},
		{nil, append([]string{"--insecure"}, credentials...), exit.Usage, "none of the others can be"},
	} {
		h.fail(test.err)
		code, out, errs := h.do(append([]string{"migrate", "web", "tcp://127.0.0.1:9"}, test.args...)...)
		if code != test.code || !strings.Contains(errs, test.want) || strings.Count(errs, "\n") != 1 || out != "" {
			t.Errorf("%v %v: code %d, want %d; %q, want %q; output %q", test.err, test.args, code, test.code, errs, test.want, out)
		}
	}
	h.fail(nil)
	for _, test := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"migrate", "web"}, exit.Usage, "accepts 2 arg"},
		{[]string{"migrate", "gone", "tcp://b"}, exit.NotFound, "running: web"},
		{[]string{"migrate", "web", "b"}, exit.Usage, "tcp://HOST"},
		{[]string{"migrate", "web", "ssh://b", "--connections", "2"}, exit.Usage, "one connection"},
		{append([]string{"migrate", "web", "ssh://b"}, credentials...), exit.Usage, "encrypts by itself"},
	} {
		code, _, errs := h.do(test.args...)
		if code != test.code || !strings.Contains(errs, test.want) {
			t.Errorf("%v: code %d: %s", test.args, code, errs)
		}
	}
	h.want("kill", "web")
	<-done
}

// fail lets migrations of machines that run fail.
func (h *host) fail(err error) { h.failure.Store(&err) }

// failing is a migration that fails as fail says.
func (h *host) failing(context.Context, *fakeMachine, func(context.Context, bool) (net.Conn, error), live.Options) (live.Report, error) {
	return live.Report{}, *h.failure.Load()
}

// TestMigrateTooLate: a cancel that comes behind the commit is told to be too
// late, and one before leaves the machine here.
func TestMigrateTooLate(t *testing.T) {
	h := newHost(t)
	for _, late := range []bool{false, true} {
		ctx, cancel := context.WithCancel(t.Context())
		h.move = func(ctx context.Context, m *fakeMachine, dial func(context.Context, bool) (net.Conn, error), o live.Options) (live.Report, error) {
			cancel()
			<-ctx.Done()
			if late {
				return moved(ctx, m, dial, o)
			}
			return live.Report{}, ctx.Err()
		}
		done := h.start("web")
		var out, errs bytes.Buffer
		code := h.env(&out, &errs).Execute(ctx, []string{"migrate", "web", "tcp://127.0.0.1:9"})
		switch {
		case late && (code != exit.OK || errs.String() != "ditto: it was too late to cancel: tcp://127.0.0.1:9 has taken over\n" || !strings.Contains(out.String(), "web runs at")):
			t.Errorf("code %d: %q, %q", code, &out, &errs)
		case !late && (code != exit.Failure || errs.String() != "ditto: interrupted: web runs on here\n"):
			t.Errorf("code %d: %q", code, &errs)
		case !late:
			h.want("kill", "web")
		}
		<-done
	}
}

// pki makes an authority and a host, and returns the flags.
func (h *host) pki(name string) []string {
	h.t.Helper()
	dir := filepath.Join(h.t.TempDir(), "pki")
	h.want("pki", "init", "--dir", dir)
	h.want("pki", "host", name, "127.0.0.1", "--dir", dir)
	return []string{"--tls-cert", filepath.Join(dir, name+".crt"), "--tls-key", filepath.Join(dir, name+".key"), "--tls-ca", filepath.Join(dir, "ca.crt")}
}

// TestMigratePlain: nothing goes over a network that is not encrypted, unless
// that was said.
func TestMigratePlain(t *testing.T) {
	l, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	port := l.Addr().(*net.TCPAddr).Port
	other := ownAddress(t)
	for _, test := range []struct {
		address string
		allowed bool
		want    error
	}{{"127.0.0.1", false, nil}, {other, true, nil}, {other, false, errPlain}} {
		c := &caller{destination: destination{address: net.JoinHostPort(test.address, fmt.Sprint(port))}, plainAllowed: test.allowed}
		f, err := c.dial(t.Context())
		if !errors.Is(err, test.want) || c.refused != (test.want != nil) {
			t.Errorf("%+v: %v", test, err)
		}
		if err == nil {
			_ = f.Close()
		}
	}
}

// ownAddress is an address of this host that is not on the loopback.
func ownAddress(t *testing.T) string {
	t.Helper()
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses {
		if n, ok := a.(*net.IPNet); ok && !n.IP.IsLoopback() && n.IP.To4() != nil {
			return n.IP.String()
		}
	}
	t.Skip("this host has no address but the loopback; try: ip link add dummy0 type dummy")
	return ""
}

// TestMigrateSSH: the machine is lent one end of a socket whose other end is
// ssh's standard input and output.
func TestMigrateSSH(t *testing.T) {
	h := newHost(t)
	dir := t.TempDir()
	ssh := filepath.Join(dir, "ssh")
	script := "#!/bin/sh\nprintf '%s|' \"$@\" >" + dir + "/words\nexec cat\n"
	if err := os.WriteFile(ssh, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	h.move = func(ctx context.Context, m *fakeMachine, dial func(context.Context, bool) (net.Conn, error), o live.Options) (live.Report, error) {
		if o.Connections != 0 || !o.Trusted {
			return live.Report{}, fmt.Errorf("over ssh with %+v", o)
		}
		c, err := dial(ctx, false)
		if err != nil {
			return live.Report{}, err
		}
		defer c.Close()
		if _, err := c.Write([]byte("echo")); err != nil {
			return live.Report{}, err
		}
		b := make([]byte, 4)
		if _, err := c.Read(b); err != nil || string(b) != "echo" {
			return live.Report{}, fmt.Errorf("%q, %w", b, err)
		}
		return moved(ctx, m, dial, o)
	}
	done := h.start("web")
	h.want("migrate", "web", "ssh://me@hostb", "--ssh", ssh+" -q", "--receive=--name=web2")
	<-done
	words, err := os.ReadFile(filepath.Join(dir, "words"))
	if want := "-q|-T|-l|me|hostb|ditto receive --stdio --name=web2|"; err != nil || strings.ReplaceAll(string(words), "'", "") != want {
		t.Errorf("%q, want %q; %v", words, want, err)
	}
}

// TestInDoubt: such a machine is seen as what it is, and taken back.
func TestInDoubt(t *testing.T) {
	h := newHost(t)
	h.move = func(_ context.Context, m *fakeMachine, _ func(context.Context, bool) (net.Conn, error), o live.Options) (live.Report, error) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.state, m.doubt = api.Paused, &api.Migration{Phase: "in-doubt", Where: o.Where, Reason: "cut"}
		return live.Report{}, &live.InDoubtError{Err: errors.New("cut")}
	}
	done := h.start("web")
	if code, _, errs := h.do("resume", "--take-back", "web"); code != exit.Failure || !strings.Contains(errs, "nothing is in doubt") {
		t.Errorf("code %d: %s", code, errs)
	}
	if code, _, errs := h.do("migrate", "web", "tcp://127.0.0.1:9"); code != exit.InDoubt {
		t.Errorf("code %d: %s", code, errs)
	}
	var rows []psRow
	if err := json.Unmarshal([]byte(h.want("ps", "--json")), &rows); err != nil || rows[0].State != "in-doubt" || rows[0].Migration.Reason != "cut" {
		t.Errorf("%+v, %v", rows, err)
	}
	h.want("resume", "--take-back", "web")
	if out := h.want("ps"); !strings.Contains(out, "running") {
		t.Error(out)
	}
	h.want("kill", "web")
	<-done
}

func TestDescribeEvent(t *testing.T) {
	got := describeEvent(live.Event{
		Phase: live.PhaseCopy, Round: 2, Done: 1, Total: 4, Sent: live.Traffic{Total: 3 << 20, Named: 4096}, Rate: 1 << 20,
		DirtyRate: 2048, Left: 8192, Expected: 41 * time.Millisecond, Throttle: 20,
	})
	want := "copy, round 2 25 %    3MiB sent  1MiB/s  names 4KiB  guest writes 2KiB/s  8KiB left  downtime now 41ms  guest slowed by 20 %"
	if got != want {
		t.Errorf("%q\n%q", got, want)
	}
}

// TestArrivalConfig: what the receiver says goes before what is offered, and what
// the guest knows stays.
func TestArrivalConfig(t *testing.T) {
	offered := config.Default()
	offered.Name, offered.Kernel, offered.Sandbox = "web", "/boot/k", false
	offered.Disks = []config.Disk{{Path: "/a.img"}, {Path: "/b.img", ReadOnly: true}}
	offered.Nets = []config.Net{{MTU: 1400, Forwards: []config.Forward{{Protocol: "tcp", HostPort: 8080, GuestPort: 80}}}}
	text, err := json.Marshal(offered)
	if err != nil {
		t.Fatal(err)
	}
	offer := func() *live.Offer {
		return &live.Offer{Name: "web", Config: text, Layers: []live.Layer{{Path: "/a.img", Disk: 0}, {Path: "/base", Disk: 0, Depth: 1}, {Path: "/b.img", Disk: 1}, {Path: "/boot/k", Disk: -1}}}
	}
	settled := offered
	settled.Sandbox = true
	mac, err := offered.Nets[0].HardwareAddr("web", 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		flags  []string
		change func(c *config.Config)
		layer  string // the first
		want   string // in the error
	}{
		{nil, func(*config.Config) {}, "/a.img", ""},
		{[]string{"--name", "db", "--sandbox", "off", "--kernel", "/k2", "-p", "none"}, func(c *config.Config) {
			c.Name, c.Sandbox, c.Kernel, c.Nets[0].Forwards = "db", false, "/k2", nil
		}, "/a.img", ""},
		{[]string{"--disk", "0=/x.img", "--disk", "blk1=/y.img"}, func(c *config.Config) {
			c.Disks = []config.Disk{{Path: "/x.img"}, {Path: "/y.img", ReadOnly: true}}
		}, "/x.img", ""},
		{[]string{"--disk", "2=/x.img"}, nil, "", "the machine has 2 disks"},
		{[]string{"--net", "user", "--net", "user"}, nil, "", "give one for each"},
	} {
		f := &arrivalFlags{}
		cmd := &cobra.Command{}
		f.add(cmd)
		if err := cmd.ParseFlags(test.flags); err != nil {
			t.Fatal(err)
		}
		o := offer()
		got, err := arrivalConfig(o, f.words(cmd.Flags()))
		if test.want != "" {
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v: %v, want %q", test.flags, err, test.want)
			}
			continue
		}
		want := settled
		want.Nets = []config.Net{offered.Nets[0]}
		want.Nets[0].MAC = mac.String()
		test.change(&want)
		if diff := cmp.Diff(want, got); diff != "" || err != nil || o.Layers[0].Path != test.layer || o.Layers[1].Path != "/base" || o.Layers[3].Path != got.Kernel {
			t.Errorf("%v: %v, %v\n%s", test.flags, err, o.Layers, diff)
		}
	}
	for _, text := range []string{``, `[]`, `{"cpus":1000}`, `{"warp":9}`} {
		if _, err := arrivalConfig(&live.Offer{Config: json.RawMessage(text)}, nil); err == nil {
			t.Errorf("%q was accepted", text)
		}
	}
}

func TestReceiveErrors(t *testing.T) {
	h := newHost(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for _, test := range []struct {
		args []string
		code int
		want string
	}{
		{nil, exit.Usage, "at least one of the flags"},
		{[]string{"--listen", "a:b:c"}, exit.Usage, "use [HOST]:PORT"},
		{[]string{"--listen", ":0"}, exit.Usage, "can be reached from other hosts"},
		{[]string{"--listen", "0.0.0.0:0"}, exit.Usage, "--insecure"},
		{[]string{"--listen", taken.Addr().String()}, exit.Net, "in use"},
		{[]string{"--listen", "127.0.0.1:0", "--stdio"}, exit.Usage, "none of the others can be"},
		{[]string{"--listen", "127.0.0.1:0", "--disk", "/x"}, exit.Usage, "N=PATH"},
		{[]string{"--listen", "127.0.0.1:0", "--disk", "x=/x"}, exit.Usage, "is no disk"},
		{[]string{"--listen", "127.0.0.1:0", "--net", "warp"}, exit.Usage, "warp"},
		{[]string{"--listen", "127.0.0.1:0", "--tls-ca", "x"}, exit.Usage, "they must all be set"},
		{[]string{"--listen", "127.0.0.1:0", "x"}, exit.Usage, "unknown command"},
		{[]string{"--listen", "127.0.0.1:0", "--log-level", "loud"}, exit.Usage, "use debug"},
	} {
		code, out, errs := h.do(append([]string{"receive"}, test.args...)...)
		if code != test.code || !strings.Contains(errs, test.want) || strings.Count(errs, "\n") != 1 || out != "" {
			t.Errorf("%v: code %d, want %d; %q, want %q; output %q", test.args, code, test.code, errs, test.want, out)
		}
	}
}

func TestPKI(t *testing.T) {
	h := newHost(t)
	dir := filepath.Join(t.TempDir(), "pki")
	if code, _, errs := h.do("pki", "show", "--dir", dir); code == 0 || !strings.Contains(errs, "ditto pki init") {
		t.Errorf("code %d: %s", code, errs)
	}
	if code, _, errs := h.do("pki", "host", "a", "--dir", dir); code == 0 || !strings.Contains(errs, "ditto pki init") {
		t.Errorf("code %d: %s", code, errs)
	}
	out := h.want("pki", "init", "--dir", dir, "--name", "ours")
	if !strings.Contains(out, "next: ") || !strings.Contains(out, "--dir '"+dir+"'") {
		t.Error(out)
	}
	if code, _, errs := h.do("pki", "init", "--dir", dir); code == 0 || !strings.Contains(errs, "exists already: nothing was changed") {
		t.Errorf("code %d: %s", code, errs)
	}
	out = h.want("pki", "host", "hosta", "10.0.0.1", "--dir", dir, "--days", "90")
	for _, want := range []string{"hosta.crt", "ditto receive --listen", "ditto migrate NAME"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in %s", want, out)
		}
	}
	out = h.want("pki", "show", "--dir", dir)
	for _, want := range []string{"ca.crt", "signing", "hosta 10.0.0.1", "ours"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in %s", want, out)
		}
	}
	var certs []struct {
		Name  string
		Hosts []string
		Until time.Time
	}
	if err := json.Unmarshal([]byte(h.want("pki", "show", filepath.Join(dir, "hosta.crt"), "--json")), &certs); err != nil || len(certs) != 1 || len(certs[0].Hosts) != 2 ||
		time.Until(certs[0].Until) > 91*24*time.Hour {
		t.Errorf("%+v, %v", certs, err)
	}
	for _, days := range []string{"0", "99999"} {
		if code, _, errs := h.do("pki", "host", "b", "--dir", dir, "--days", days); code != exit.Usage || !strings.Contains(errs, "--days") {
			t.Errorf("code %d: %s", code, errs)
		}
	}
	if code, _, errs := h.do("pki", "host", "a b", "--dir", dir); code == 0 || !strings.Contains(errs, "neither a host name nor") {
		t.Errorf("code %d: %s", code, errs)
	}
}

// TestMigrateGone: a machine whose process does not answer any more.
func TestMigrateGone(t *testing.T) {
	h := newHost(t)
	h.move = func(_ context.Context, m *fakeMachine, _ func(context.Context, bool) (net.Conn, error), _ live.Options) (live.Report, error) {
		m.end <- vmproc.Exit{Reason: "error", Code: exit.GuestError, Err: errors.New("broken")}
		return live.Report{}, lend.ErrEnding
	}
	done := h.start("web")
	if code, _, errs := h.do("migrate", "web", "tcp://127.0.0.1:9"); code != exit.Migration || !strings.Contains(errs, "web ended meanwhile: broken") {
		t.Errorf("code %d: %s", code, errs)
	}
	<-done
}
