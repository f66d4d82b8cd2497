package names

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"ditto.vm/memory"
)

// stormSource is a disk in memory that the race detector does not watch: devices
// race as they do.
type stormSource []byte

func (s stormSource) ReadAt(p []byte, off int64) (int, error) {
	if n := copy(p, s[off:]); n < len(p) {
		return n, io.EOF
	}
	return len(p), nil
}

const (
	stormPages  = 1024 // of the frames 0 and 1
	stormBlocks = 256
	// Only pages below are stored into by vCPUs, so that of the others even
	// provisional names must be right.
	stormStored = 700
)

// TestStorm lets disks, vCPUs, another consumer of the tracker and the prover
// race over few pages and blocks, with the kernel's tracker, and compares names
// with bytes whenever they pause.
func TestStorm(t *testing.T) {
	s := newStage(t, memory.TrackerWPAsync, 0)
	s.fill(stageFrames)
	space, err := memory.New(memory.Config{Size: stormBlocks * BlockSize})
	if err != nil {
		t.Fatal(err)
	}
	defer space.Close()
	disk, err := space.View(0, space.Size())
	if err != nil {
		t.Fatal(err)
	}
	layer, err := s.table.AddLayer(Layer{Title: "storm", Size: int64(len(disk)), Source: stormSource(disk)})
	if err != nil {
		t.Fatal(err)
	}
	compared := [2]int{}
	for round := range uint64(30) {
		s.storm(layer, disk, round)
		s.settle()
		for gfn := range memory.GFN(stormPages) {
			n := s.table.At(gfn)
			if n.Kind() != Block || !n.Proven() && gfn < stormStored {
				continue
			}
			if !bytes.Equal(s.view(gfn), disk[n.Number()*BlockSize:][:BlockSize]) {
				t.Fatalf("round %d: page %s is not %s (proven %t)", round, gfn, n, n.Proven())
			}
			if n.Proven() {
				compared[0]++
			} else {
				compared[1]++
			}
		}
		if err := s.table.invariants(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("compared %d proven and %d provisional names", compared[0], compared[1])
	if compared[0] < 100 || compared[1] < 100 {
		t.Errorf("compared %d proven and %d provisional names: too few to show anything", compared[0], compared[1])
	}
}

// storm is one round.
func (s *stage) storm(layer LayerID, disk []byte, round uint64) {
	ctx, cancel := context.WithCancel(context.Background())
	var prover, workers sync.WaitGroup
	prover.Go(func() {
		for ctx.Err() == nil {
			if _, err := s.prover.Step(ctx); err != nil {
				s.t.Error(err)
			}
		}
	})
	for worker := range uint64(3) {
		workers.Go(func() { s.device(layer, disk, rand.New(rand.NewPCG(round, worker))) })
	}
	workers.Go(func() {
		rng := rand.New(rand.NewPCG(round, 100))
		set := s.space.NewPageSet()
		for range 200 {
			s.view(memory.GFN(rng.IntN(stormStored)))[rng.IntN(4096)]++
			if rng.IntN(20) == 0 {
				frame := memory.Range{Start: memory.GPA(rng.IntN(2)) * memory.LargeFrameSize, Size: memory.LargeFrameSize}
				if err := s.watch.Collect(frame, set, memory.Rearm); err != nil {
					s.t.Error(err)
				}
			}
		}
	})
	workers.Wait()
	cancel()
	prover.Wait()
	s.steps(int(round % 4))
}

// device does requests of a disk, some bytes at a time.
func (s *stage) device(layer LayerID, disk []byte, rng *rand.Rand) {
	for range 100 {
		n := 1 + rng.Uint64N(4)
		page, block := rng.Uint64N(stormPages-n), rng.Uint64N(stormBlocks-n)
		off := int64(block) * BlockSize
		mem := pages(page, n)
		data, err := s.space.View(mem[0].Start, mem[0].Size)
		if err != nil {
			s.t.Error(err)
			return
		}
		blocks := disk[off:][:len(data)]
		switch rng.IntN(8) {
		case 0, 1, 2, 3:
			s.table.BeginRead(layer, off, mem)
			copy(data, blocks)
			s.space.Wrote(mem[0].Start, mem[0].Size)
			s.table.EndRead(layer, off, mem, true)
		case 4, 5:
			s.table.BeginWrite(layer, off, mem)
			copy(blocks, data)
			s.table.EndWrite(layer, off, mem, true)
		case 6:
			s.table.BeginErase(layer, off, int64(len(blocks)))
			for i := range n {
				blocks[i*BlockSize+rng.Uint64N(BlockSize)]++ // as good as zeros
			}
			s.table.EndErase(layer, off, int64(len(blocks)))
		case 7:
			data[rng.IntN(len(data))]++
			s.space.Wrote(mem[0].Start, mem[0].Size)
		}
	}
}
