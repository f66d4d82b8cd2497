package live

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"testing"
	"time"
)

// TestStorm moves VMs whose guests write all the time to memory and disk, with
// hints of which some are wrong and more become so, over connections and disks of
// changing speed, in every mode. At the switch-over memory is the same on both
// sides. TestMutants shows that it would find out.
func TestStorm(t *testing.T) {
	seeds := uint64(24)
	if s := os.Getenv("DITTO_STORM_SEEDS"); s != "" {
		var err error
		if seeds, err = strconv.ParseUint(s, 10, 32); err != nil {
			t.Fatal(err)
		}
	}
	rounds, asked, duplicates := 0, uint64(0), uint64(0)
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 7))
			w := newWorld(t, 600, 200)
			vm := newFakeVM(w, 8<<20)
			vm.fill(seed)
			vm.guest = writer(seed, time.Duration(random.IntN(3)*10)*time.Microsecond)
			h := &fakeHost{w: w, slow: random.IntN(2) == 0, missing: map[int]bool{1: random.IntN(4) == 0}}
			sameAtSwitch(vm, h)
			vm.startFirst()
			o := Options{
				Connections: random.IntN(4), Trusted: random.IntN(2) == 0, NoNames: random.IntN(6) == 0,
				Downtime: 1, Timeout: 120 * time.Millisecond, OnTimeout: TimeoutStop, NoThrottle: random.IntN(2) == 0,
				Verify: random.IntN(4) == 0,
			}
			if random.IntN(2) == 0 {
				o.Compression = Zstd
			}
			if random.IntN(3) == 0 {
				o.Proof = ProofBLAKE3
			}
			postcopy := random.IntN(5) == 0
			if postcopy {
				o.OnTimeout = TimeoutPostcopy
			}
			n := loopback(t)
			if random.IntN(2) == 0 {
				n = jittery(n, seed)
			}
			e := move(t.Context(), vm, h, n, o, ReceiveOptions{Postcopy: true})
			if postcopy && e.sendErr == nil {
				pulled(t, vm, h)
			}
			if e.sendErr != nil || e.recvErr != nil || !h.runs() {
				t.Errorf("source: %v, destination: %v", e.sendErr, e.recvErr)
			}
			rounds, asked, duplicates = max(rounds, e.report.Rounds), asked+e.report.Pages.Asked, duplicates+e.report.Pages.Duplicate
		})
	}
	// What was not there was not tested.
	if rounds < 3 || asked == 0 || duplicates == 0 {
		t.Errorf("%d rounds at most, %d pages asked for, %d duplicates", rounds, asked, duplicates)
	}
}

// jittery makes connections of a network stutter, each in its own way.
func jittery(n network, seed uint64) network {
	accept := n.accept
	n.accept = func(ctx context.Context) (net.Conn, error) {
		seed++
		c, err := accept(ctx)
		if err != nil {
			return nil, err
		}
		return &jitter{Conn: c, random: rand.New(rand.NewPCG(seed, 8))}, nil
	}
	return n
}

// jitter is a connection that is slow to read from at times.
type jitter struct {
	net.Conn
	random *rand.Rand // of the one who reads
}

func (j *jitter) Read(p []byte) (int, error) {
	if j.random.IntN(4) == 0 {
		time.Sleep(time.Duration(j.random.IntN(4)) * time.Millisecond)
	}
	return j.Conn.Read(p[:min(len(p), 1+j.random.IntN(200_000))])
}
