package chain

import (
	"fmt"
	"math/rand"
	"path/filepath"
	"testing"

	"ditto.vm/images/disk"
)

// BenchmarkQueue keeps random 4 KiB requests in flight on clusters that are
// allocated, in a raw image and in chains of qcow2: what the format costs.
func BenchmarkQueue(b *testing.B) {
	const size = 256 << 20
	for _, depth := range []int{0, 1, 3} {
		for _, cache := range []disk.Cache{disk.CacheWriteback, disk.CacheNone} {
			dir := b.TempDir()
			path := filepath.Join(dir, "base")
			if err := create(path, Raw, size); err != nil {
				b.Fatal(err)
			}
			c := openChain(b, path, Options{Cache: cache})
			for i := range depth {
				next := filepath.Join(dir, fmt.Sprint(i))
				if err := c.CreateOverlay(next); err != nil {
					b.Fatal(err)
				}
				if err := c.Stack(next); err != nil {
					b.Fatal(err)
				}
			}
			buf := make([]byte, 1<<20)
			rand.New(rand.NewSource(1)).Read(buf)
			for at := int64(0); at < size; at += 1 << 20 {
				if err := c.WriteAtv([][]byte{buf}, at); err != nil {
					b.Fatal(err)
				}
			}
			if err := c.Flush(); err != nil {
				b.Fatal(err)
			}
			q := newQueue(b, c)
			for _, write := range []bool{false, true} {
				b.Run(fmt.Sprintf("overlays=%d/%s/write=%v", depth, cache, write), func(b *testing.B) {
					benchmarkQueue(b, q, size, write)
				})
			}
			if err := q.Close(); err != nil {
				b.Fatal(err)
			}
			if err := c.Close(); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func benchmarkQueue(b *testing.B, q disk.Queue, size int, write bool) {
	const block = 4096
	rng := rand.New(rand.NewSource(1))
	space := make([]byte, (testDepth+1)*block)
	var bufs [testDepth][][]byte
	start := func(token int) {
		bufs[token] = append(bufs[token][:0], space[token*block:][:block])
		at := int64(rng.Intn(size/block)) * block
		if write {
			q.Write(token, bufs[token], at, false)
		} else {
			q.Read(token, bufs[token], at)
		}
	}
	for token := range testDepth {
		start(token)
	}
	q.Submit()
	b.SetBytes(block)
	b.ReportAllocs()
	done := 0
	for b.Loop() {
		token, err := wait(q)
		if err != nil {
			b.Fatal(err)
		}
		start(token)
		if done++; done%(testDepth/2) == 0 {
			q.Submit()
		}
	}
	q.Submit()
	for range testDepth {
		if _, err := wait(q); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFirstWrite writes 4 KiB to clusters of an empty overlay: allocation
// and copying of the rest of the cluster.
func BenchmarkFirstWrite(b *testing.B) {
	const size, cluster = 1 << 40, 64 << 10
	path := filepath.Join(b.TempDir(), "base")
	if err := create(path, Raw, size); err != nil {
		b.Fatal(err)
	}
	c := openChain(b, path, Options{})
	next := filepath.Join(b.TempDir(), "top")
	if err := c.CreateOverlay(next); err != nil {
		b.Fatal(err)
	}
	if err := c.Stack(next); err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 4096)
	buf[0] = 1
	at := int64(4096)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		if err := c.WriteAtv([][]byte{buf}, at); err != nil {
			b.Fatal(err)
		}
		at += cluster
	}
	if err := c.Close(); err != nil {
		b.Fatal(err)
	}
}
