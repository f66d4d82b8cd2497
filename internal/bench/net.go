package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

const iperfSeconds = 4

// network: iperf3 between the guest and its host over a tap device.
func network() Benchmark {
	return Benchmark{
		Name:  "net-tap",
		Title: fmt.Sprintf("iperf3, one TCP stream between a Debian guest (%d vCPU) and its host over tap, no vhost, %d s a run", loadCPUs, iperfSeconds),
		Where: Lab, NeedsDisk: true, Rounds: 5, Warmups: 1,
		Metrics: []Metric{
			{"to-guest", "Gbit/s", Higher, "host to guest, as received"},
			{"from-guest", "Gbit/s", Higher, "guest to host, as received"},
		},
		Targets: []Target{
			{"to-guest", nameDitto, nameQEMU, 1},
			{"from-guest", nameDitto, nameQEMU, 1},
		},
		OpenLimit: 5 * time.Minute, RunLimit: 2 * time.Minute,
		Open: openNetwork,
	}
}

// netSession measures traffic of two running guests.
type netSession struct{ *pair }

// Addresses of the link to contestant i.
func hostAddress(i int) string  { return fmt.Sprintf("198.18.%d.1", i) }
func guestAddress(i int) string { return fmt.Sprintf("198.18.%d.2", i) }

func openNetwork(ctx context.Context, env *Env) (Session, error) {
	if err := needLoad(env); err != nil {
		return nil, err
	}
	for _, tool := range []string{"iperf3", "ip"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, &Unavailable{Reason: tool + " is not installed: apt install iperf3 iproute2"}
		}
	}
	guests := [2]spec{loadGuest(env), loadGuest(env)}
	taps := [2]string{"bench-ditto", "bench-qemu"}
	for i := range guests {
		guests[i].tap = taps[i]
	}
	p, err := openPair(ctx, twoWays(env, guests[0], guests[1]), nil)
	if err != nil {
		return nil, err
	}
	for i, g := range p.guests {
		if err := connect(ctx, g, i, taps[i]); err != nil {
			return nil, errors.Join(fmt.Errorf("%s: %w", p.cmds[i].name, err), p.Close())
		}
	}
	return netSession{p}, nil
}

// connect gives both ends of a tap an address and starts the guest's server.
// The tap goes with the process that made it.
func connect(ctx context.Context, g *shellGuest, i int, tap string) error {
	for _, args := range [][]string{
		{"ip", "address", "replace", hostAddress(i) + "/24", "dev", tap},
		{"ip", "link", "set", tap, "up"},
	} {
		if _, err := output(ctx, args...); err != nil {
			return err
		}
	}
	_, err := g.run(ctx, "ip link set lo up && cd /sys/class/net && for d in *; do [ $d = lo ] || { ip link set $d up && "+
		"ip address add "+guestAddress(i)+"/24 dev $d; }; done && iperf3 -s -D")
	return err
}

// Run implements [Session].
func (s netSession) Run(ctx context.Context, i int) (Sample, error) {
	sample := Sample{}
	for _, way := range []struct {
		metric string
		flags  []string
	}{{"to-guest", nil}, {"from-guest", []string{"-R"}}} {
		args := append([]string{"iperf3", "-J", "-c", guestAddress(i), "-O", "1", "-t", strconv.Itoa(iperfSeconds)}, way.flags...)
		out, err := output(ctx, args...)
		if err != nil {
			return nil, err
		}
		if sample[way.metric], err = iperfValue(out); err != nil {
			return nil, err
		}
	}
	return sample, nil
}

// iperfValue reads what the receiver got, in Gbit/s.
func iperfValue(out []byte) (float64, error) {
	var report struct {
		Error string `json:"error"`
		End   struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return 0, fmt.Errorf("iperf3: %w", err)
	}
	if report.Error != "" {
		return 0, fmt.Errorf("iperf3: %s", report.Error)
	}
	if report.End.Received.BitsPerSecond <= 0 {
		return 0, errors.New("iperf3: nothing was received")
	}
	return report.End.Received.BitsPerSecond / 1e9, nil
}

// output runs a short command; its error holds what it said.
func output(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		said := strings.TrimSpace(errs.String())
		if said == "" {
			said = strings.TrimSpace(string(out[:min(len(out), 300)]))
		}
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, said)
	}
	return out, nil
}
