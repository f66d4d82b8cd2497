package serial

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// line records the level of an interrupt line and its rising edges.
type line struct {
	mu    sync.Mutex
	level bool
	edges int
}

func (l *line) SetLevel(asserted bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if asserted && !l.level {
		l.edges++
	}
	l.level = asserted
}

func (l *line) asserted() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.level
}

// output collects what the guest sends and how it was cut into writes.
type output struct {
	mu     sync.Mutex
	all    bytes.Buffer
	writes int
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.writes++
	return o.all.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.all.String()
}

// bench is a UART with its surroundings.
type bench struct {
	*Device
	t    testing.TB
	line *line
	out  *output
}

func newBench(t testing.TB) *bench {
	b := &bench{t: t, line: &line{}, out: &output{}}
	b.Device = New(Config{Line: b.line, Output: b.out})
	t.Cleanup(func() { _ = b.Close() })
	return b
}

func (b *bench) in(register uint64) byte {
	var v [1]byte
	b.ReadRegister(register, v[:])
	return v[0]
}

func (b *bench) outb(register uint64, v byte) { b.WriteRegister(register, []byte{v}) }

func (b *bench) input(s string) {
	b.t.Helper()
	if n, err := b.WriteInput(context.Background(), []byte(s)); n != len(s) || err != nil {
		b.t.Fatalf("WriteInput: %d, %v", n, err)
	}
}

func (b *bench) flush() {
	b.t.Helper()
	if err := b.Flush(context.Background()); err != nil {
		b.t.Fatal(err)
	}
}

// TestLinuxAutoconfig is what Linux's 8250 driver does to tell the chip
// (drivers/tty/serial/8250/8250_port.c, autoconfig and autoconfig_16550a).
func TestLinuxAutoconfig(t *testing.T) {
	b := newBench(t)
	b.outb(regIER, 0)
	if v := b.in(regIER) & 0xf; v != 0 {
		t.Errorf("IER after 0: %#x", v)
	}
	b.outb(regIER, 0xf)
	if v := b.in(regIER) & 0xf; v != 0xf {
		t.Errorf("IER after 0xf: %#x", v)
	}
	b.outb(regIER, 0)

	b.outb(regMCR, mcrLoop|mcrOUT2|mcrRTS)
	if v := b.in(regMSR) & 0xf0; v != msrDCD|msrCTS {
		t.Errorf("MSR in loopback: %#x", v)
	}
	b.outb(regMCR, mcrOUT2)

	b.outb(regLCR, 0xbf)
	b.outb(regIIR, 0) // EFR
	b.outb(regLCR, 0)
	b.outb(regIIR, fcrEnable)
	if v := b.in(regIIR); v>>6 != 3 {
		t.Errorf("IIR with FIFOs: %#x is no 16550A", v)
	}
	b.outb(regLCR, lcrDLAB)
	if b.in(regIIR) == 0 {
		t.Error("register 2 reads 0 with DLAB: taken for a 16650")
	}
	b.outb(regLCR, 0xe0)
	if v := b.in(regIIR); v&mcrLoop != 0 {
		t.Error("taken for a National 16550 with extensions")
	}
	b.outb(regLCR, lcrDLAB)
	b.outb(regIIR, fcrEnable|0x20)
	if v := b.in(regIIR); v>>5 != 6 {
		t.Errorf("IIR %#x: taken for a 16750", v)
	}
	b.outb(regLCR, 0)
	b.outb(regIER, 0x40)
	if b.in(regIER)&0x40 != 0 {
		t.Error("taken for an XScale UART")
	}
}

// TestTransmitInterruptReasserts is serial8250_do_startup's THRE test.
func TestTransmitInterruptReasserts(t *testing.T) {
	b := newBench(t)
	for range 2 {
		b.outb(regIER, ierTransmit)
		if !b.line.asserted() {
			t.Fatal("enabling THRE did not interrupt")
		}
		if v := b.in(regIIR); v != iirTransmit {
			t.Fatalf("IIR %#x", v)
		}
		if b.line.asserted() || b.in(regIIR) != iirNone {
			t.Fatal("reading IIR did not take the interrupt back")
		}
		b.outb(regIER, 0)
	}
	b.outb(regIER, ierTransmit)
	b.outb(regData, 'x')
	if !b.line.asserted() {
		t.Error("a byte sent did not interrupt")
	}
	b.outb(regIER, 0)
	if b.line.asserted() {
		t.Error("interrupt stays after it was disabled")
	}
}

func TestOutput(t *testing.T) {
	b := newBench(t)
	for _, c := range []byte("hello\nworld") {
		if b.in(regLSR)&lsrTransmitter != lsrTransmitter {
			t.Fatal("transmitter is busy")
		}
		b.outb(regData, c)
	}
	b.flush()
	if got := b.out.String(); got != "hello\nworld" {
		t.Errorf("got %q", got)
	}
	if s := b.Stats(); s.Sent != 11 || s.Lost != 0 {
		t.Errorf("stats %+v", s)
	}
}

func TestLinesAreOneWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		for range 10 {
			for _, c := range []byte(strings.Repeat("x", 79) + "\n") {
				b.outb(regData, c)
			}
			synctest.Wait()
		}
		if b.out.writes != 10 {
			t.Errorf("10 lines took %d writes", b.out.writes)
		}
		b.outb(regData, '#') // a prompt has no newline
		synctest.Wait()
		b.flush()
		if !strings.HasSuffix(b.out.String(), "\n#") {
			t.Errorf("prompt is missing in %q", b.out.String())
		}
		_ = b.Close()
	})
}

// blocked is an Output that does not take anything until it is released.
type blocked struct {
	entered chan struct{}
	release chan struct{}
	got     bytes.Buffer
}

func (b *blocked) Write(p []byte) (int, error) {
	b.entered <- struct{}{}
	<-b.release
	return b.got.Write(p)
}

func TestSlowOutputHoldsTheGuest(t *testing.T) {
	out := &blocked{entered: make(chan struct{}, 1), release: make(chan struct{})}
	l := &line{}
	d := New(Config{Line: l, Output: out})
	defer d.Close()
	b := &bench{Device: d, t: t, line: l}
	b.outb(regData, '\n')
	<-out.entered
	b.outb(regIER, ierTransmit)
	for range transmitBuffer {
		b.outb(regData, 'x')
	}
	if b.in(regLSR)&lsrTransmitter != 0 || b.line.asserted() {
		t.Error("transmitter says ready while the buffer is full")
	}
	if !b.State().TransmitReady {
		t.Error("a restored guest would wait for an interrupt that never comes")
	}
	b.outb(regData, 'y')
	if s := b.Stats(); s.Lost != 1 {
		t.Errorf("stats %+v", s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := d.Flush(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("flush of a blocked output: %v", err)
	}
	close(out.release)
	<-out.entered
	b.flush()
	if b.in(regLSR)&lsrTransmitter != lsrTransmitter || !b.line.asserted() {
		t.Error("transmitter does not say that it is ready again")
	}
	if n := out.got.Len(); n != transmitBuffer+1 {
		t.Errorf("%d bytes written", n)
	}
}

// failing is an Output on a full disk.
type failing struct{}

func (failing) Write(p []byte) (int, error) { return 1, io.ErrShortWrite }

func TestFailingOutput(t *testing.T) {
	d := New(Config{Line: &line{}, Output: failing{}})
	d.WriteRegister(regData, []byte("a"))
	d.WriteRegister(regData, []byte("b"))
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d.WriteRegister(regData, []byte("c"))
	if s := d.Stats(); s.Sent+s.Lost != 3 || s.Sent == 0 {
		t.Errorf("stats %+v", s)
	}
}

func TestReceive(t *testing.T) {
	b := newBench(t)
	b.outb(regIER, ierReceive)
	b.outb(regIIR, fcrEnable|2<<fcrTriggerShift) // 8 bytes
	b.input("1234567")
	if v := b.in(regIIR); v != iirTimeout|iirFIFO {
		t.Errorf("7 of 8 bytes: IIR %#x", v)
	}
	b.input("8")
	if v := b.in(regIIR); v != iirReceive|iirFIFO || !b.line.asserted() {
		t.Errorf("8 bytes: IIR %#x", v)
	}
	var got []byte
	for b.in(regLSR)&lsrDataReady != 0 {
		got = append(got, b.in(regData))
	}
	if string(got) != "12345678" || b.line.asserted() {
		t.Errorf("got %q, line %t", got, b.line.asserted())
	}
	if b.in(regData) != 0 {
		t.Error("an empty receiver gives data")
	}
}

func TestInputWaitsForRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.outb(regIIR, fcrEnable)
		text := strings.Repeat("0123456789", 10)
		done := make(chan error, 1)
		go func() {
			_, err := b.WriteInput(t.Context(), []byte(text))
			done <- err
		}()
		var got []byte
		for len(got) < len(text) {
			synctest.Wait()
			if n := len(b.State().Received); n > fifoSize {
				t.Fatalf("%d bytes in the FIFO", n)
			}
			got = append(got, b.in(regData))
		}
		if err := <-done; err != nil || string(got) != text {
			t.Errorf("%v, %q", err, got)
		}
		_ = b.Close()
	})
}

func TestPauseHoldsInput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.outb(regData, 'x')
		if err := b.Pause(t.Context()); err != nil || b.out.String() != "x" {
			t.Fatalf("%v, output %q", err, b.out.String())
		}
		done := make(chan error, 1)
		go func() {
			_, err := b.WriteInput(t.Context(), []byte("a"))
			done <- err
		}()
		synctest.Wait()
		if len(b.State().Received) != 0 {
			t.Error("input arrived while paused")
		}
		b.Resume()
		if err := <-done; err != nil || b.in(regData) != 'a' {
			t.Errorf("input after the pause: %v", err)
		}
		_ = b.Close()
	})
}

func TestInputEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t) // without FIFOs: one byte of room
		ctx, cancel := context.WithCancel(t.Context())
		for _, test := range []struct {
			name string
			end  func()
			want error
		}{
			{"cancelled", cancel, context.Canceled},
			{"closed", func() { _ = b.Close() }, io.ErrClosedPipe},
		} {
			result := make(chan error)
			go func() {
				n, err := b.WriteInput(ctx, []byte("ab"))
				if n != 1 {
					t.Errorf("%s: %d bytes went in", test.name, n)
				}
				result <- err
			}()
			synctest.Wait()
			test.end()
			if err := <-result; !errors.Is(err, test.want) {
				t.Errorf("%s: %v", test.name, err)
			}
			b.in(regData)
			ctx = t.Context()
		}
	})
}

func TestBreak(t *testing.T) {
	b := newBench(t)
	b.outb(regIIR, fcrEnable)
	b.outb(regIER, ierLine)
	if err := b.SendBreak(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.input("h")
	if v := b.in(regIIR); v != iirLine|iirFIFO {
		t.Errorf("IIR %#x", v)
	}
	if v := b.in(regLSR); v&(lsrBreak|lsrDataReady|lsrFIFOError) != lsrBreak|lsrDataReady|lsrFIFOError {
		t.Errorf("LSR %#x", v)
	}
	if v := b.in(regLSR); v&lsrErrors != 0 || b.line.asserted() {
		t.Errorf("break was not taken back: LSR %#x", v)
	}
	if b.in(regData) != 0 || b.in(regData) != 'h' {
		t.Error("break is not a zero byte before the h")
	}
}

func TestLoopback(t *testing.T) {
	b := newBench(t)
	b.outb(regMCR, mcrLoop)
	b.in(regMSR)
	b.outb(regData, 'a')
	if b.in(regLSR)&lsrDataReady == 0 || b.in(regData) != 'a' {
		t.Error("byte did not come back")
	}
	b.outb(regData, 'b')
	b.outb(regData, 'c')
	if v := b.in(regLSR); v&lsrOverrun == 0 {
		t.Errorf("no overrun: LSR %#x", v)
	}
	if v := b.in(regLSR); v&lsrOverrun != 0 {
		t.Error("overrun was not taken back")
	}
	b.outb(regIER, ierModem)
	b.outb(regMCR, mcrLoop|mcrOUT1)
	if v := b.in(regMSR); v != msrRI {
		t.Errorf("RI rising: MSR %#x", v)
	}
	b.outb(regMCR, mcrLoop|mcrDTR)
	if !b.line.asserted() || b.in(regIIR) != iirModem {
		t.Error("modem status did not interrupt")
	}
	if v := b.in(regMSR); v != msrDSR|1<<2|1<<1 {
		t.Errorf("RI falling, DSR rising: MSR %#x", v)
	}
	b.flush()
	if got := b.out.String(); got != "" {
		t.Errorf("loopback left the device: %q", got)
	}
}

func TestDivisorAndScratch(t *testing.T) {
	b := newBench(t)
	b.outb(regLCR, lcrDLAB|3)
	b.outb(regData, 0x34)
	b.outb(regIER, 0x12)
	b.outb(regSCR, 0xa5)
	if b.in(regData) != 0x34 || b.in(regIER) != 0x12 || b.in(regSCR) != 0xa5 || b.in(regLCR) != lcrDLAB|3 {
		t.Error("registers do not read back")
	}
	b.outb(regLCR, 3)
	if b.in(regIER) != 0 {
		t.Error("divisor leaked into IER")
	}
	b.flush()
	if b.out.String() != "" {
		t.Error("divisor was sent")
	}
	b.Reset()
	if b.in(regSCR) != 0 || b.in(regLCR) != 0 {
		t.Error("reset did not reset")
	}
}

func TestStateRoundTrip(t *testing.T) {
	b := newBench(t)
	b.outb(regIIR, fcrEnable|3<<fcrTriggerShift)
	b.outb(regIER, ierReceive|ierTransmit)
	b.outb(regSCR, 7)
	b.input("abc")
	if err := b.SendBreak(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := b.State()
	c := newBench(t)
	if err := c.SetState(want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, c.State()); diff != "" {
		t.Error(diff)
	}
	if !c.line.asserted() || c.in(regIIR) != b.in(regIIR) || c.in(regData) != 'a' {
		t.Error("the restored device behaves differently")
	}
}

func TestSetStateRefuses(t *testing.T) {
	b := newBench(t)
	for name, s := range map[string]State{
		"IER":                {IER: 0x10},
		"MCR":                {MCR: 0x20},
		"FCR":                {FCR: 0x40},
		"FCR bits":           {FCR: fcrEnable | fcrClearReceive},
		"delta":              {ModemDelta: 0x10},
		"two without FIFO":   {Received: []byte("ab"), Breaks: make([]bool, 2)},
		"17 bytes":           {FCR: fcrEnable, Received: make([]byte, 17), Breaks: make([]bool, 17)},
		"flags do not match": {FCR: fcrEnable, Received: []byte("a")},
	} {
		if err := b.SetState(s); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// FuzzRegisters plays arbitrary accesses. The line always shows what IIR says,
// and the state always restores.
func FuzzRegisters(f *testing.F) {
	f.Add([]byte{0x11, 0x02, 0x10, 'a', 0x12, 0xc1, 0x20, 'b', 0x08, 0})
	f.Add([]byte{0x14, 0x10, 0x10, 'a', 0x10, 'b', 0x0d, 0, 0x14, 0x1f, 0x0e, 0})
	f.Fuzz(func(t *testing.T, program []byte) {
		b := newBench(t)
		restored := newBench(t)
		for ; len(program) >= 2; program = program[2:] {
			register, v := uint64(program[0]&7), program[1]
			switch program[0] >> 3 & 3 {
			case 0, 1:
				b.in(register)
			case 2:
				b.outb(register, v)
			case 3:
				if s := b.State(); s.MCR&mcrLoop == 0 && len(s.Received) < b.capacity() {
					b.input(string([]byte{v}))
				}
			}
			s := b.State()
			if err := restored.SetState(s); err != nil {
				t.Fatalf("own state is refused: %v", err)
			}
			if diff := cmp.Diff(s, restored.State()); diff != "" {
				t.Fatal(diff)
			}
			if level := b.line.asserted(); level != restored.line.asserted() {
				t.Fatalf("line is %t, restored %t", level, restored.line.asserted())
			}
			if (restored.in(regIIR)&iirNone == 0) != b.line.asserted() {
				t.Fatal("line and IIR disagree")
			}
		}
		_ = b.Close()
		_ = restored.Close()
	})
}

// BenchmarkTransmit measures what a byte costs the vCPU thread.
func BenchmarkTransmit(b *testing.B) {
	d := New(Config{Line: &line{}, Output: io.Discard})
	defer d.Close()
	data := []byte{'x'}
	b.SetBytes(1)
	b.ReportAllocs()
	for b.Loop() {
		d.WriteRegister(regData, data)
	}
}
