package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// netPair is two network namespaces, joined by a link that can be shaped.
//
//	bench-PID-a 198.19.0.1 ---veth--- 198.19.0.2 bench-PID-b
type netPair struct {
	names  [2]string
	places [2]place
}

// linkName is the link's name in both.
const linkName = "link0"

// openNetPair makes the namespaces.
func openNetPair(ctx context.Context) (_ *netPair, err error) {
	if os.Geteuid() != 0 {
		return nil, &Unavailable{Reason: "network namespaces are made by root"}
	}
	for _, tool := range []string{"ip", "tc"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, &Unavailable{Reason: tool + " is not installed: apt install iproute2"}
		}
	}
	p := &netPair{}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	for i, side := range []string{"a", "b"} {
		name := fmt.Sprintf("bench-%d-%s", os.Getpid(), side)
		if _, err := output(ctx, "ip", "netns", "add", name); err != nil {
			return nil, err
		}
		p.names[i] = name
		p.places[i] = place{enter: []string{"ip", "netns", "exec", name}, address: fmt.Sprintf("198.19.0.%d", i+1)}
	}
	commands := [][]string{{"ip", "link", "add", linkName, "netns", p.names[0], "type", "veth", "peer", "name", linkName, "netns", p.names[1]}}
	for i, name := range p.names {
		commands = append(commands,
			[]string{"ip", "-n", name, "address", "add", p.places[i].address + "/24", "dev", linkName},
			[]string{"ip", "-n", name, "link", "set", "lo", "up"},
			[]string{"ip", "-n", name, "link", "set", linkName, "up"})
	}
	for _, args := range commands {
		if _, err := output(ctx, args...); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// shape limits both directions to so many Mbit/s, 0 for no limit.
func (p *netPair) shape(ctx context.Context, mbit int) error {
	for _, name := range p.names {
		args := []string{"tc", "-n", name, "qdisc", "replace", "dev", linkName, "root"}
		if mbit == 0 {
			args = append(args, "pfifo", "limit", "1000")
		} else {
			// The bucket holds 4 ms, and a segment of the largest size.
			burst := max(mbit*1000/8*4, 128<<10)
			args = append(args, "tbf", "rate", strconv.Itoa(mbit)+"mbit", "burst", strconv.Itoa(burst), "latency", "50ms")
		}
		if _, err := output(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

// carried is how many bytes the link carried so far, in both directions, with
// the headers of its frames.
func (p *netPair) carried(ctx context.Context) (uint64, error) {
	sum := uint64(0)
	for _, counter := range []string{"rx_bytes", "tx_bytes"} {
		out, err := output(ctx, p.places[0].in("cat", "/sys/class/net/"+linkName+"/statistics/"+counter)...)
		if err != nil {
			return 0, err
		}
		n, err := strconv.ParseUint(strings.TrimSpace(string(out)), 10, 64)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// close removes the namespaces, and the link with them.
func (p *netPair) close() (err error) {
	for _, name := range p.names {
		if name != "" {
			_, failed := output(context.Background(), "ip", "netns", "delete", name)
			err = errors.Join(err, failed)
		}
	}
	return err
}
