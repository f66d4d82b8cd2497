package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// place is a host of a migration, which may be a network namespace.
type place struct {
	// enter is what comes before a command that runs there.
	enter []string
	// address is where others reach it.
	address string
}

// loopback is this host.
func loopback() place { return place{address: "127.0.0.1"} }

// in is a command that runs at a place.
func (p place) in(args ...string) []string { return append(append([]string{}, p.enter...), args...) }

// moved is what a migration was.
type moved struct {
	total    time.Duration // as the VMM says
	asked    time.Duration // from the request until the source said that it is done
	downtime time.Duration // as the VMM says
	sent     uint64        // bytes, as the VMM says
	cpu      time.Duration // of the processes on both sides
}

// how a guest is moved.
type how struct {
	places      [2]place // it begins in the first
	connections int
	tls         string // folder of the certificates of tlsFiles, empty for none
	zstd        bool
	throttle    bool // a guest that writes too fast is slowed down
}

// carrier is a guest that is moved to and fro by one VMM.
type carrier interface {
	// command is how the guest is started.
	command() []string
	// start starts it.
	start() error
	// console is the guest's console, where the guest is.
	console() *child
	// pause stops the guest.
	pause(ctx context.Context) error
	// move moves the guest to the other place, and lets it run or stand as it did.
	move(ctx context.Context) (moved, error)
	// close ends all VMMs.
	close() error
}

// dittoCarrier is ditto.
type dittoCarrier struct {
	how
	ditto, name string
	args        []string // that start the guest, its name apart

	at int    // index of the place
	vm *child // where the guest began, until it has been moved
	// joined is the console where it is since.
	joined *child
}

// called is the guest's name at a place.
func (d *dittoCarrier) called(at int) string { return fmt.Sprintf("%s-%d", d.name, at) }

func (d *dittoCarrier) command() []string {
	return d.places[0].in(append(append([]string{}, d.args...), "--name", d.called(0))...)
}

func (d *dittoCarrier) start() (err error) {
	d.at = 0
	d.vm, err = startChild(d.command(), true)
	return err
}

func (d *dittoCarrier) console() *child {
	if d.joined != nil {
		return d.joined
	}
	return d.vm
}

func (d *dittoCarrier) pause(ctx context.Context) error {
	_, err := output(ctx, d.ditto, "pause", d.called(d.at))
	return err
}

func (d *dittoCarrier) move(ctx context.Context) (m moved, err error) {
	receive, migrate := d.commands()
	r, err := startChild(receive, false)
	if err != nil {
		return m, err
	}
	defer r.stop()
	const marker = `"address":"`
	from, _, err := r.waitFor(ctx, 0, marker)
	if err != nil {
		return m, err
	}
	to, _, err := r.waitFor(ctx, from, `"`)
	if err != nil {
		return m, err
	}
	migrate = append(migrate, "tcp://"+r.out.slice(from, to-1))
	before := time.Duration(0)
	if d.vm != nil {
		if before, err = cpuTime(d.vm.cmd.Process.Pid); err != nil {
			return m, err
		}
	}
	began := time.Now()
	out, err := output(ctx, migrate...)
	m.asked = time.Since(began)
	if err != nil {
		return m, r.explain(err)
	}
	if err := m.readReport(out); err != nil {
		return m, err
	}
	if err := d.spent(ctx, &m, r, before); err != nil {
		return m, err
	}
	return m, d.join()
}

// commands are what runs at either side; the address is missing.
func (d *dittoCarrier) commands() (receive, migrate []string) {
	from, to := d.places[d.at], d.places[1-d.at]
	receive = to.in(d.ditto, "receive", "--json", "--once", "--listen", to.address+":0", "--name", d.called(1-d.at))
	migrate = from.in(d.ditto, "migrate", d.called(d.at), "--json", "--connections", strconv.Itoa(d.connections))
	switch {
	case d.tls != "":
		receive, migrate = append(receive, tlsFlags(d.tls, "there")...), append(migrate, tlsFlags(d.tls, "here")...)
		migrate = append(migrate, "--tls-server-name", "there")
	case to.enter != nil:
		receive, migrate = append(receive, "--insecure"), append(migrate, "--insecure")
	}
	if d.zstd {
		migrate = append(migrate, "--compress", "zstd")
	}
	if !d.throttle {
		migrate = append(migrate, "--no-throttle")
	}
	return receive, migrate
}

// spent waits for the end of the source, if it is a child, and adds what both sides
// spent.
func (d *dittoCarrier) spent(ctx context.Context, m *moved, r *child, before time.Duration) error {
	if d.vm == nil {
		return nil
	}
	select {
	case <-d.vm.ended:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	state := d.vm.cmd.ProcessState
	m.cpu = state.UserTime() + state.SystemTime() - before
	at, _, err := r.waitFor(ctx, 0, `"event":"arrived"`)
	if err != nil {
		return err
	}
	if _, _, err := r.waitFor(ctx, at, "\n"); err != nil {
		return err
	}
	var arrived struct{ PID int }
	lines := strings.Split(strings.TrimSpace(r.out.slice(0, r.out.size())), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &arrived); err != nil {
		return err
	}
	there, err := cpuTime(arrived.PID)
	m.cpu += there
	return err
}

// join joins the console where the guest is now.
func (d *dittoCarrier) join() (err error) {
	d.console().stop()
	d.vm, d.at = nil, 1-d.at
	d.joined, err = startChild([]string{d.ditto, "console", d.called(d.at)}, true)
	return err
}

func (d *dittoCarrier) close() (err error) {
	if d.joined != nil {
		d.joined.stop()
	}
	if d.vm != nil {
		d.vm.stop()
	} else if d.joined != nil {
		_, err = output(context.Background(), d.ditto, "kill", d.called(d.at))
	}
	d.vm, d.joined = nil, nil
	return err
}

// readReport reads the last of the events of ditto migrate.
func (m *moved) readReport(events []byte) error {
	var last struct {
		Event    string        `json:"event"`
		Total    time.Duration `json:"total_ns"`
		Downtime time.Duration `json:"downtime_ns"`
		Sent     struct {
			Total uint64 `json:"total"`
		} `json:"sent"`
	}
	lines := bytes.Split(bytes.TrimSpace(events), []byte("\n"))
	if err := json.Unmarshal(lines[len(lines)-1], &last); err != nil {
		return fmt.Errorf("ditto migrate: %w", err)
	}
	if last.Event != "migrated" || last.Total <= 0 {
		return fmt.Errorf("ditto migrate said last: %.300s", lines[len(lines)-1])
	}
	m.total, m.downtime, m.sent = last.Total, last.Downtime, last.Sent.Total
	return nil
}

// qemuCarrier is QEMU.
type qemuCarrier struct {
	how
	args   []string // that start the guest
	socket string   // where its monitors will be

	at  int
	now *child
}

// monitor is the socket at a place.
func (q *qemuCarrier) monitor(at int) string { return fmt.Sprintf("%s.%d", q.socket, at) }

// side is the command of either side.
func (q *qemuCarrier) side(at int, endpoint string) []string {
	args := append(append([]string{}, q.args...), "-qmp", "unix:"+q.monitor(at)+",server=on,wait=off")
	if q.tls != "" {
		// ditto's certificates are for signatures only, as TLS 1.3 has them.
		args = append(args, "-object", "tls-creds-x509,id=tls0,verify-peer=on,sanity-check=off,endpoint="+endpoint+",dir="+q.tls+"/"+endpoint)
	}
	return q.places[at].in(args...)
}

func (q *qemuCarrier) command() []string { return q.side(0, "client") }

func (q *qemuCarrier) start() (err error) {
	q.at = 0
	q.now, err = startChild(q.command(), true)
	return err
}

func (q *qemuCarrier) console() *child { return q.now }

func (q *qemuCarrier) pause(ctx context.Context) error {
	monitor, err := dialQMP(ctx, q.monitor(q.at))
	if err != nil {
		return err
	}
	return errors.Join(monitor.do("stop", nil, nil), monitor.Close())
}

func (q *qemuCarrier) move(ctx context.Context) (m moved, err error) {
	there, err := startChild(append(q.side(1-q.at, "server"), "-incoming", "defer"), true)
	if err != nil {
		return m, err
	}
	defer func() {
		if err != nil {
			err = there.explain(err)
			there.stop()
		}
	}()
	in, err := dialQMP(ctx, q.monitor(1-q.at))
	if err != nil {
		return m, err
	}
	defer func() { _ = in.Close() }()
	out, err := dialQMP(ctx, q.monitor(q.at))
	if err != nil {
		return m, err
	}
	defer func() { _ = out.Close() }()
	for _, monitor := range []*qmp{in, out} {
		if err := q.prepare(monitor); err != nil {
			return m, err
		}
	}
	if m, err = q.run(ctx, in, out, there); err != nil {
		return m, err
	}
	q.now.stop()
	q.now, q.at = there, 1-q.at
	return m, nil
}

// run runs a migration that was prepared.
func (q *qemuCarrier) run(ctx context.Context, in, out *qmp, there *child) (m moved, err error) {
	to := q.places[1-q.at].address
	port, err := listen(in, to)
	if err != nil {
		return m, err
	}
	before, err := cpuTimes(q.now, there)
	if err != nil {
		return m, err
	}
	began := time.Now()
	if err := out.do("migrate", map[string]any{"uri": "tcp:" + to + ":" + port}, nil); err != nil {
		return m, err
	}
	report, err := out.migrated(ctx)
	if err != nil {
		return m, err
	}
	m = moved{asked: time.Since(began), total: ms(report.TotalTime), downtime: ms(report.Downtime), sent: report.RAM.Transferred}
	if err := in.running(ctx); err != nil {
		return m, err
	}
	after, err := cpuTimes(q.now, there)
	m.cpu = after - before
	return m, err
}

func (q *qemuCarrier) close() error {
	if q.now != nil {
		q.now.stop()
	}
	q.now = nil
	return nil
}

// prepare sets up either side's migration.
func (q *qemuCarrier) prepare(monitor *qmp) error {
	parameters := map[string]any{"max-bandwidth": 0}
	if q.connections > 0 {
		parameters["multifd-channels"] = q.connections
	}
	if q.tls != "" {
		parameters["tls-creds"], parameters["tls-hostname"] = "tls0", "there"
	}
	if q.zstd {
		parameters["multifd-compression"] = "zstd"
	}
	return monitor.setMigration(map[string]bool{"multifd": q.connections > 0, "auto-converge": q.throttle}, parameters)
}

// listen lets the destination listen, and returns the port.
func listen(in *qmp, address string) (string, error) {
	if err := in.do("migrate-incoming", map[string]any{"uri": "tcp:" + address + ":0"}, nil); err != nil {
		return "", err
	}
	var where struct {
		Sockets []struct {
			Port string `json:"port"`
		} `json:"socket-address"`
	}
	if err := in.do("query-migrate", nil, &where); err != nil {
		return "", err
	}
	if len(where.Sockets) == 0 {
		return "", errors.New("QEMU: query-migrate names no socket to migrate to")
	}
	return where.Sockets[0].Port, nil
}

func ms(v float64) time.Duration { return time.Duration(v * float64(time.Millisecond)) }

// cpuTimes is the sum of [cpuTime].
func cpuTimes(all ...*child) (sum time.Duration, err error) {
	for _, c := range all {
		t, err := cpuTime(c.cmd.Process.Pid)
		if err != nil {
			return 0, err
		}
		sum += t
	}
	return sum, nil
}

// cpuTime is what a process has used of all cores, with its threads (proc(5)).
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The name, in parentheses, may hold spaces.
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	const user, system, hz = 11, 12, 100
	if len(fields) <= system {
		return 0, fmt.Errorf("/proc/%d/stat is too short", pid)
	}
	ticks := uint64(0)
	for _, i := range []int{user, system} {
		n, err := strconv.ParseUint(fields[i], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/%d/stat: %w", pid, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / hz, nil
}

// tlsFlags are ditto's for one side.
func tlsFlags(dir, side string) []string {
	return []string{"--tls-cert", dir + "/" + side + ".crt", "--tls-key", dir + "/" + side + ".key", "--tls-ca", dir + "/ca.crt"}
}

// tlsFiles makes an authority and a certificate for each side in a new folder:
// ditto's files, and the same as QEMU wants to find them.
func tlsFiles(ctx context.Context, ditto, dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for _, args := range [][]string{{"init"}, {"host", "here"}, {"host", "there"}} {
		if _, err := output(ctx, append(append([]string{ditto, "pki"}, args...), "--dir", dir)...); err != nil {
			return err
		}
	}
	for endpoint, side := range map[string]string{"client": "here", "server": "there"} {
		if err := os.Mkdir(dir+"/"+endpoint, 0o700); err != nil {
			return err
		}
		for from, to := range map[string]string{
			"ca.crt": "ca-cert.pem", side + ".crt": endpoint + "-cert.pem", side + ".key": endpoint + "-key.pem",
		} {
			if err := os.Symlink("../"+from, dir+"/"+endpoint+"/"+to); err != nil {
				return err
			}
		}
	}
	return nil
}
