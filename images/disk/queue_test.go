package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"os"
	"testing"

	"go.uber.org/goleak"

	"golang.org/x/sys/unix"
)

const testDepth = 32

// queues makes every kind of queue over r.
func queues(t *testing.T, r *Raw) map[string]Queue {
	t.Helper()
	p, err := newPool(r, testDepth)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]Queue{"pool": p}
	q, err := r.NewQueue(testDepth)
	if err != nil {
		t.Fatal(err)
	}
	if _, isRing := q.(*ringQueue); isRing {
		out["ring"] = q
	} else {
		t.Log("no io_uring here: check /proc/sys/kernel/io_uring_disabled")
		_ = q.Close()
	}
	t.Cleanup(func() {
		for name, q := range out {
			if err := q.Close(); err != nil {
				t.Errorf("close %s: %v", name, err)
			}
		}
	})
	return out
}

// next waits for one completion.
func next(q Queue) (int, error) {
	for {
		if token, err, ok := q.Completed(); ok {
			return token, err
		}
		q.Wait()
	}
}

// one submits what was asked for and waits for it.
func one(q Queue) error {
	q.Submit()
	_, err := next(q)
	return err
}

// TestMetamorphic gives every engine, in every cache mode, the same random
// requests as a plain slice of bytes; the contents must agree.
func TestMetamorphic(t *testing.T) {
	ignore := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, ignore) })
	const size = 1 << 20
	for _, cache := range []Cache{CacheWriteback, CacheNone, CacheWritethrough} {
		t.Run(cache.String(), func(t *testing.T) {
			r := open(t, makeDisk(t, size), Options{Cache: cache})
			for name, q := range queues(t, r) {
				t.Run(name, func(t *testing.T) { metamorphic(t, r, q, size) })
			}
		})
	}
}

func metamorphic(t *testing.T, r *Raw, q Queue, size int) {
	rng := rand.New(rand.NewSource(1))
	want := make([]byte, size)
	if err := r.ReadAtv([][]byte{want}, 0); err != nil {
		t.Fatal(err)
	}
	for round := range 60 {
		// Requests in flight at once do not overlap: each has a lane.
		lane := size / testDepth
		type check struct{ got, want []byte }
		checks := map[int]check{}
		for token := range testDepth {
			base := token * lane
			off := rng.Intn(lane/1024) * 512
			n := (rng.Intn((lane-off)/512) + 1) * 512
			at := base + off
			data := r.buffer(n)
			if rng.Intn(4) == 0 {
				data = make([]byte, n+1)[1:] // misaligned
			}
			switch rng.Intn(6) {
			case 0, 1:
				rng.Read(data)
				copy(want[at:], data)
				q.Write(token, split(rng, data), int64(at), rng.Intn(4) == 0)
			case 2, 3:
				checks[token] = check{data, want[at : at+n]}
				q.Read(token, split(rng, data), int64(at))
			case 4:
				clear(want[at : at+n])
				q.WriteZeroes(token, int64(at), int64(n), rng.Intn(2) == 0)
			case 5:
				q.Flush(token)
			}
		}
		q.Submit()
		for range testDepth {
			token, err := next(q)
			if err != nil {
				t.Fatalf("round %d, request %d: %v", round, token, err)
			}
			if c, ok := checks[token]; ok && !bytes.Equal(c.got, c.want) {
				t.Fatalf("round %d, request %d read something else", round, token)
			}
		}
		if _, _, ok := q.Completed(); ok {
			t.Fatal("more completions than requests")
		}
	}
	got := make([]byte, size)
	if err := r.ReadAtv([][]byte{got}, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("disk and model differ at the end")
	}
}

// split cuts data into pieces of whole sectors, so that aligned data stay so.
func split(rng *rand.Rand, data []byte) [][]byte {
	var out [][]byte
	for len(data) > 512 && rng.Intn(4) != 0 {
		n := (rng.Intn(len(data)/512) + 1) * 512
		out, data = append(out, data[:n]), data[n:]
	}
	if len(data) > 0 {
		out = append(out, data)
	}
	return out
}

// TestManyBuffers reads and writes with as many buffers as a chain can have.
func TestManyBuffers(t *testing.T) {
	const n = 1022
	r := open(t, makeDisk(t, n*512), Options{})
	for name, q := range queues(t, r) {
		data, back := bytes.Repeat([]byte(name+"!"), n*512/5+1)[:n*512], make([]byte, n*512)
		cut := func(b []byte) (out [][]byte) {
			for i := range n {
				out = append(out, b[i*512:(i+1)*512])
			}
			return out
		}
		q.Write(0, cut(data), 0, true)
		if err := one(q); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		q.Read(0, cut(back), 0)
		if err := one(q); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !bytes.Equal(data, back) {
			t.Errorf("%s: read something else", name)
		}
	}
}

// TestShrunk truncates the file under the disk: requests fail, nothing hangs.
func TestShrunk(t *testing.T) {
	path := makeDisk(t, 1<<20)
	r := open(t, path, Options{})
	if err := os.Truncate(path, 1000); err != nil {
		t.Fatal(err)
	}
	for name, q := range queues(t, r) {
		for _, offset := range []int64{512, 4096} {
			q.Read(3, [][]byte{make([]byte, 1024)}, offset)
			if err := one(q); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%s: read at %d: %v, want unexpected end", name, offset, err)
			}
		}
	}
	if err := r.ReadAtv([][]byte{make([]byte, 1024)}, 512); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("read: %v, want unexpected end", err)
	}
}

// TestReadOnlyFails writes to a disk that was opened for reading.
func TestReadOnlyFails(t *testing.T) {
	r := open(t, makeDisk(t, 1<<20), Options{ReadOnly: true})
	for name, q := range queues(t, r) {
		q.Write(0, [][]byte{make([]byte, 512)}, 0, false)
		if err := one(q); !errors.Is(err, unix.EBADF) {
			t.Errorf("%s: write: %v, want EBADF", name, err)
		}
		q.WriteZeroes(0, 0, 512, true)
		if err := one(q); err == nil {
			t.Errorf("%s: write-zeroes succeeds", name)
		}
	}
}

// TestFlushLost checks that after a failed flush none succeeds.
func TestFlushLost(t *testing.T) {
	r := open(t, makeDisk(t, 1<<20), Options{})
	if err := r.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := r.flushed(unix.EIO); !errors.Is(err, unix.EIO) {
		t.Errorf("failed flush: %v", err)
	}
	if err := r.Flush(); !errors.Is(err, ErrFlushLost) {
		t.Errorf("flush after a failed one: %v", err)
	}
	for name, q := range queues(t, r) {
		q.Flush(0)
		if err := one(q); !errors.Is(err, ErrFlushLost) {
			t.Errorf("%s: flush after a failed one: %v", name, err)
		}
	}
}

// TestDiscardFrees checks that discarding gives storage back and that what is
// zeroed with unmap reads as zeros.
func TestDiscardFrees(t *testing.T) {
	const size = 1 << 20
	for _, erase := range []struct {
		name string
		run  func(r *Raw) error
	}{
		{"discard", func(r *Raw) error { return r.Discard(0, size) }},
		{"write-zeroes with unmap", func(r *Raw) error { return r.WriteZeroes(0, size, true) }},
	} {
		path := makeDisk(t, size)
		r := open(t, path, Options{})
		if err := r.WriteAtv([][]byte{bytes.Repeat([]byte{1}, size)}, 0); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(r.Flush(), erase.run(r)); err != nil {
			t.Fatalf("%s: %v", erase.name, err)
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		if st.Blocks != 0 && !r.noPunch.Load() {
			t.Errorf("%s left %d sectors", erase.name, st.Blocks)
		}
		got := make([]byte, size)
		if err := r.ReadAtv([][]byte{got}, 0); err != nil || !bytes.Equal(got, make([]byte, size)) {
			t.Errorf("%s: range does not read as zeros (%v)", erase.name, err)
		}
	}
}

// TestZeroFallback writes zeros where the file system can do nothing else.
func TestZeroFallback(t *testing.T) {
	const size = 3<<20 + 512
	r := open(t, makeDisk(t, size), Options{})
	r.noPunch.Store(true)
	r.noZeroRange.Store(true)
	full := bytes.Repeat([]byte{1}, size)
	if err := r.WriteAtv([][]byte{full}, 0); err != nil {
		t.Fatal(err)
	}
	if err := r.WriteZeroes(512, size-1024, true); err != nil {
		t.Fatal(err)
	}
	clear(full[512 : size-512])
	got := make([]byte, size)
	if err := r.ReadAtv([][]byte{got}, 0); err != nil || !bytes.Equal(got, full) {
		t.Errorf("content is wrong (%v)", err)
	}
}

// TestPartialResult goes on where the kernel stopped.
func TestPartialResult(t *testing.T) {
	const size, done = 8192, 5000
	r := open(t, makeDisk(t, size), Options{})
	want := make([]byte, size)
	rand.New(rand.NewSource(1)).Read(want)
	if err := r.WriteAtv([][]byte{want}, 0); err != nil {
		t.Fatal(err)
	}
	q, ok := queues(t, r)["ring"].(*ringQueue)
	if !ok {
		t.Skip("no io_uring: check /proc/sys/kernel/io_uring_disabled")
	}
	got := make([]byte, size)
	q.ops[0] = ringOp{raw: r, kind: opRead, bufs: [][]byte{got[:4096], got[4096:]}, left: size}
	if finished, err := q.finish(0, done); finished || err != nil {
		t.Fatalf("finished %v, %v", finished, err)
	}
	if _, err := next(q); err != nil {
		t.Fatal(err)
	}
	clear(want[:done]) // nobody read those
	if !bytes.Equal(got, want) {
		t.Error("did not go on where it stopped")
	}
	q.ops[0] = ringOp{raw: r, kind: opWrite, bufs: [][]byte{want}, left: size, iov: appendIovecs(nil, [][]byte{want}, 0)}
	if finished, _ := q.finish(0, -int32(unix.EINTR)); finished {
		t.Fatal("an interrupted request counts as finished")
	}
	if _, err := next(q); err != nil {
		t.Fatal(err)
	}
	if err := r.ReadAtv([][]byte{got}, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("an interrupted write was not made (%v)", err)
	}
}

// dirty counts the pages of the file that are not on storage yet.
func dirty(t *testing.T, r *Raw) uint64 {
	t.Helper()
	var fs unix.Statfs_t
	if err := unix.Fstatfs(r.fd, &fs); err != nil {
		t.Fatal(err)
	}
	if fs.Type == unix.TMPFS_MAGIC {
		t.Skip("nothing is ever stable on tmpfs: set TMPDIR to a disk")
	}
	var stat unix.Cachestat_t
	if err := unix.Cachestat(uint(r.fd), &unix.CachestatRange{}, &stat, 0); err != nil {
		t.Skipf("cachestat: %v: needs Linux 6.5", err)
	}
	return stat.Dirty + stat.Writeback
}

// TestStable checks by the page cache that what must be stable is: synchronous
// writes, flushes, and everything in writethrough mode.
func TestStable(t *testing.T) {
	data := bytes.Repeat([]byte{1}, 64<<10)
	stable := func(t *testing.T, r *Raw, what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if n := dirty(t, r); n != 0 {
			t.Errorf("%d pages are dirty after %s", n, what)
		}
	}
	t.Run("writeback", func(t *testing.T) {
		r := open(t, makeDisk(t, 1<<20), Options{})
		for name, q := range queues(t, r) {
			q.Write(0, [][]byte{data}, 0, true)
			stable(t, r, name+": a synchronous write", one(q))
			q.Write(0, [][]byte{data}, 0, false)
			if err := one(q); err != nil {
				t.Fatal(err)
			}
			q.Flush(0)
			stable(t, r, name+": a flush", one(q))
		}
		if err := r.WriteAtv([][]byte{data}, 0); err != nil {
			t.Fatal(err)
		}
		stable(t, r, "Flush", r.Flush())
	})
	t.Run("writethrough", func(t *testing.T) {
		r := open(t, makeDisk(t, 1<<20), Options{Cache: CacheWritethrough})
		stable(t, r, "WriteAtv", r.WriteAtv([][]byte{data}, 0))
		stable(t, r, "WriteZeroes", r.WriteZeroes(512, 3000, false))
		r.noZeroRange.Store(true)
		stable(t, r, "WriteZeroes by hand", r.WriteZeroes(512, 3000, false))
	})
}

// TestRingIsRestricted checks that the ring refuses what a disk never asks.
func TestRingIsRestricted(t *testing.T) {
	r := open(t, makeDisk(t, 1<<20), Options{})
	ring, err := newRing(testDepth)
	if err != nil {
		t.Skipf("no io_uring (%v): check /proc/sys/kernel/io_uring_disabled", err)
	}
	defer func() {
		if err := ring.close(); err != nil {
			t.Error(err)
		}
	}()
	const opNop, opOpenat = 0, 18
	for _, op := range []byte{opNop, opOpenat} {
		ring.entry(op, r.fd, 1, 0, 0, 0, 0)
		ring.submit(func(_ uint64, errno unix.Errno) { t.Errorf("operation %d was refused whole: %v", op, errno) })
		if _, res, ok := ring.completed(); !ok || unix.Errno(-res) != unix.EACCES {
			t.Errorf("operation %d: result %d, want EACCES", op, res)
		}
	}
}

// TestRingRefuses: requests that the kernel does not take fail, and the queue
// goes on when it takes some again.
func TestRingRefuses(t *testing.T) {
	r := open(t, makeDisk(t, 1<<20), Options{})
	queue, err := r.NewQueue(testDepth)
	if err != nil {
		t.Fatal(err)
	}
	defer queue.Close()
	q, ok := queue.(*ringQueue)
	if !ok {
		t.Skip("no io_uring: check /proc/sys/kernel/io_uring_disabled")
	}
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(null)
	buf := [][]byte{r.buffer(4096)}
	for range 3 {
		good := q.ring.fd
		q.ring.fd = null // no ring
		q.Read(0, buf, 0)
		q.Read(3, buf, 4096)
		q.Submit()
		q.ring.fd = good
		for _, want := range []int{0, 3} {
			if token, err, ok := q.Completed(); !ok || token != want || err == nil {
				t.Errorf("request %d: token %d, %v, %t; want it to fail", want, token, err, ok)
			}
		}
		if token, err, ok := q.Completed(); ok {
			t.Errorf("request %d completed twice (%v)", token, err)
		}
		q.Read(1, buf, 0)
		if err := one(q); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	}
}

func BenchmarkQueue(b *testing.B) {
	const size, block = 256 << 20, 4096
	path := makeDisk(b, size)
	for _, cache := range []Cache{CacheWriteback, CacheNone} {
		r, err := Open(path, Options{Cache: cache})
		if err != nil {
			b.Fatal(err)
		}
		if err := r.WriteAtv([][]byte{r.buffer(size)}, 0); err != nil {
			b.Fatal(err)
		}
		q, err := r.NewQueue(testDepth)
		if err != nil {
			b.Fatal(err)
		}
		p, err := newPool(r, testDepth)
		if err != nil {
			b.Fatal(err)
		}
		buf := r.buffer(testDepth * block)
		for name, q := range map[string]Queue{"ring": q, "pool": p} {
			for _, write := range []bool{false, true} {
				b.Run(fmt.Sprintf("%s/%s/write=%v", cache, name, write), func(b *testing.B) {
					benchmarkQueue(b, q, buf, size, write)
				})
			}
		}
		if err := errors.Join(q.Close(), p.Close(), r.Close()); err != nil {
			b.Fatal(err)
		}
	}
}

// benchmarkQueue keeps testDepth random 4 KiB requests in flight.
func benchmarkQueue(b *testing.B, q Queue, buf []byte, size int, write bool) {
	const block = 4096
	rng := rand.New(rand.NewSource(1))
	var bufs [testDepth][][]byte
	start := func(token int) {
		bufs[token] = append(bufs[token][:0], buf[token*block:(token+1)*block])
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
		token, err := next(q)
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
		if _, err := next(q); err != nil {
			b.Fatal(err)
		}
	}
}
