package pki

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// counted is a socket whose writes are counted, and fail on demand.
type counted struct {
	net.Conn
	mu     sync.Mutex
	writes int
	fail   error
}

func (c *counted) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.writes++
	if c.fail != nil {
		return 0, c.fail
	}
	return c.Conn.Write(p)
}

// configs are those of two hosts of one authority.
func configs(t testing.TB) (client, server *tls.Config) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "pki")
	if err := Init(dir, "test", DefaultCALife); err != nil {
		t.Fatal(err)
	}
	var both []Credentials
	for _, host := range []string{"a", "b"} {
		if _, _, err := Host(dir, host, []string{host}, DefaultHostLife); err != nil {
			t.Fatal(err)
		}
		c, err := Load(filepath.Join(dir, host+".crt"), filepath.Join(dir, host+".key"), filepath.Join(dir, CACert))
		if err != nil {
			t.Fatal(err)
		}
		both = append(both, c)
	}
	client, err := both[0].Client("b")
	if err != nil {
		t.Fatal(err)
	}
	if server, err = both[1].Server(); err != nil {
		t.Fatal(err)
	}
	return client, server
}

// sockets are the ends of a TCP connection.
func sockets(t testing.TB) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = a.Close(), b.Close() })
	return a, b
}

// connPair is both ends of a connection of TLS, and the socket of the first.
func connPair(t testing.TB) (a, b *Conn, socket *counted) {
	t.Helper()
	client, server := configs(t)
	x, y := sockets(t)
	socket = &counted{Conn: x}
	a, b = Client(socket, client), Server(y, server)
	done := make(chan error, 1)
	go func() { done <- b.ready() }()
	if err := errors.Join(a.ready(), <-done); err != nil {
		t.Fatal(err)
	}
	return a, b, socket
}

// TestConnBatches: everything arrives as it was written, whatever the sizes, and
// many records by one system call.
func TestConnBatches(t *testing.T) {
	a, b, socket := connPair(t)
	random := rand.New(rand.NewPCG(1, 2))
	var want bytes.Buffer
	got := make(chan []byte, 1)
	go func() {
		all, _ := io.ReadAll(b)
		got <- all
	}()
	for range 40 {
		var buffers net.Buffers
		for range random.IntN(20) {
			p := make([]byte, random.IntN(3)*random.IntN(60_000)+random.IntN(300))
			for i := range p {
				p[i] = byte(random.Uint32())
			}
			buffers = append(buffers, p)
			want.Write(p)
		}
		size := int64(0)
		for _, p := range buffers {
			size += int64(len(p))
		}
		if n, err := a.WriteBuffers(&buffers); n != size || err != nil || len(buffers) != 0 {
			t.Fatalf("%d of %d bytes, %v", n, size, err)
		}
	}
	socket.writes = 0
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	want.Write(big)
	if n, err := a.Write(big); n != len(big) || err != nil {
		t.Fatal(n, err)
	}
	if most := len(big)/batchSize + 2; socket.writes > most {
		t.Errorf("%d bytes took %d system calls, not %d", len(big), socket.writes, most)
	}
	if err := a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if diff := bytes.Equal(<-got, want.Bytes()); !diff {
		t.Error("what arrived is not what was written")
	}
}

// TestConnFirstWrite: the handshake is made by a write that is large.
func TestConnFirstWrite(t *testing.T) {
	for name, write := range map[string]func(*Conn, []byte) error{
		"Write":        func(c *Conn, p []byte) error { _, err := c.Write(p); return err },
		"WriteBuffers": func(c *Conn, p []byte) error { _, err := c.WriteBuffers(&net.Buffers{p}); return err },
	} {
		t.Run(name, func(t *testing.T) {
			client, server := configs(t)
			x, y := sockets(t)
			wrote := make(chan error, 1)
			p := make([]byte, 1<<20)
			go func() { wrote <- write(Client(x, client), p) }()
			_, err := io.ReadFull(Server(y, server), p)
			if err := errors.Join(err, <-wrote); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestConnDeadline: a peer that does not read lets the write end at its deadline,
// and the connection stays broken.
func TestConnDeadline(t *testing.T) {
	a, _, _ := connPair(t)
	if err := a.SetWriteDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 1<<20)
	var err error
	for range 64 {
		if _, err = a.Write(p); err != nil {
			break
		}
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("error %v", err)
	}
	if err := a.SetWriteDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Write([]byte("more")); err == nil {
		t.Error("it goes on after bytes were lost")
	}
}

// TestConnClose: Close ends a write that waits.
func TestConnClose(t *testing.T) {
	a, _, _ := connPair(t)
	ended := make(chan error, 1)
	go func() {
		p := make([]byte, 1<<20)
		for {
			if _, err := a.WriteBuffers(&net.Buffers{p}); err != nil {
				ended <- err
				return
			}
		}
	}()
	time.AfterFunc(20*time.Millisecond, func() { _ = a.Close() })
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("error %v", err)
	}
}

// TestConnFails: a failure at the end of a batch is the writer's, who has been told
// of no byte that was lost.
func TestConnFails(t *testing.T) {
	a, _, socket := connPair(t)
	broken := errors.New("broken")
	socket.mu.Lock()
	socket.fail = broken
	socket.mu.Unlock()
	p := make([]byte, maxRecord+1) // two records, one write
	for range 2 {
		if n, err := a.Write(p); !errors.Is(err, broken) || n != 0 {
			t.Errorf("%d bytes, %v", n, err)
		}
	}
}

// BenchmarkConn sends 1 MiB at a time over loopback, by crypto/tls alone and in
// batches.
func BenchmarkConn(b *testing.B) {
	client, server := configs(b)
	p := make([]byte, 1<<20)
	for _, name := range []string{"tls", "batched"} {
		b.Run(name, func(b *testing.B) {
			x, y := sockets(b)
			var from, to net.Conn = tls.Client(x, client), tls.Server(y, server)
			if name == "batched" {
				from, to = Client(x, client), Server(y, server)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				in := make([]byte, 1<<20)
				for {
					if _, err := to.Read(in); err != nil {
						return
					}
				}
			}()
			b.SetBytes(int64(len(p)))
			before := used()
			for b.Loop() {
				if _, err := from.Write(p); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric((used()-before).Seconds()/float64(b.N)/float64(len(p))*1e12, "cpu-ms/GB")
			_ = from.Close()
			<-done
		})
	}
}

// used is what this process used of all cores.
func used() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
