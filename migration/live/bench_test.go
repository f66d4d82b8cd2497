package live

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/big"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/migration/pki"
)

// encrypted lays TLS over a network.
func encrypted(t testing.TB, n network) network {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"there"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	server := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS13}
	client := &tls.Config{RootCAs: pool, ServerName: "there", MinVersion: tls.VersionTLS13}
	return network{
		dial: func(ctx context.Context) (net.Conn, error) {
			c, err := n.dial(ctx)
			if err != nil {
				return nil, err
			}
			return pki.Client(c, client), nil
		},
		accept: func(ctx context.Context) (net.Conn, error) {
			c, err := n.accept(ctx)
			if err != nil {
				return nil, err
			}
			return pki.Server(c, server), nil
		},
	}
}

// benchMemory is the memory that benchmarks move.
const benchMemory = 1 << 30

// BenchmarkRaw moves memory that nothing names. Bytes a second are of memory.
func BenchmarkRaw(b *testing.B) {
	w := newWorld(b)
	vm := newFakeVM(w, benchMemory)
	page := make([]byte, memory.PageSize)
	for i := range vm.hints {
		_, _ = rand.Read(page[:64])
		if err := vm.mem.WriteAt(page, vm.gfn(i).GPA()); err != nil {
			b.Fatal(err)
		}
	}
	for _, transport := range []string{"plain", "trusted", "tls"} {
		for _, connections := range []int{0, 1, 2, 4} {
			b.Run(fmt.Sprintf("%s/%d", transport, connections), func(b *testing.B) {
				n := loopback(b)
				if transport == "tls" {
					n = encrypted(b, n)
				}
				benchMove(b, vm, n, Options{Connections: connections, NoNames: true, Trusted: transport != "plain"})
			})
		}
	}
}

// BenchmarkNamed moves memory of which every page is a block.
func BenchmarkNamed(b *testing.B) {
	const pages = benchMemory >> memory.PageShift
	w := newWorld(b, pages)
	vm := newFakeVM(w, benchMemory)
	for i := range vm.hints {
		block := i ^ 0x155 // runs, but not one
		vm.hints[i] = names.OfBlock(0, uint64(block))
		if err := vm.mem.WriteAt(w.layers[0][block<<memory.PageShift:][:memory.PageSize], vm.gfn(i).GPA()); err != nil {
			b.Fatal(err)
		}
	}
	for _, proof := range []Proof{ProofXXH3, ProofBLAKE3} {
		b.Run(string(proof), func(b *testing.B) {
			benchMove(b, vm, loopback(b), Options{Connections: 4, Proof: proof, Trusted: true})
		})
	}
}

func benchMove(b *testing.B, vm *fakeVM, n network, o Options) {
	b.SetBytes(int64(vm.mem.Size()))
	var wire, downtime float64
	var cpu time.Duration
	for b.Loop() {
		b.StopTimer()
		vm.w.disks.Store(nil)
		vm.w.runners.Store(0)
		vm.stopped = nil
		vm.startFirst()
		h := &fakeHost{w: vm.w}
		b.StartTimer()
		before := cpuTime()
		e := move(b.Context(), vm, h, n, o, ReceiveOptions{})
		b.StopTimer()
		cpu += cpuTime() - before
		if e.sendErr != nil || e.recvErr != nil {
			b.Fatal(e.sendErr, e.recvErr)
		}
		wire, downtime = float64(e.report.Sent.Total), e.report.Downtime.Seconds()
		_ = h.mem.Close()
		b.StartTimer()
	}
	b.ReportMetric(wire/float64(vm.mem.Size())*100, "%wire")
	b.ReportMetric(downtime*1000, "ms-down")
	b.ReportMetric(cpu.Seconds()/float64(b.N)/float64(vm.mem.Size())*1e12, "cpu-ms/GB")
}

// cpuTime is what this process used of all cores.
func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
