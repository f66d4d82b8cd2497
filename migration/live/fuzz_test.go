package live

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"testing"
	"time"

	"ditto.vm/memory"
	"ditto.vm/migration/wire"
)

// sealed returns frames with right checksums, as far as their lengths make sense.
func sealed(b []byte) []byte {
	b = append([]byte(nil), b...)
	for at := 0; at+wire.HeaderSize <= len(b); {
		head := int(b[at+8]) | int(b[at+9])<<8 | int(b[at+10])<<16
		payload := int(b[at+12]) | int(b[at+13])<<8 | int(b[at+14])<<16
		end := at + wire.HeaderSize + head
		if end > len(b) {
			break
		}
		wire.Finish(b[:end], at, wire.Type(b[at+4]), b[at+5], payload)
		at = end + payload
	}
	return b
}

// messages makes a stream of messages.
func messages(all ...wire.Message) (b []byte) {
	for _, m := range all {
		b = wire.Append(b, m)
	}
	return b
}

// fuzzOffer is a VM of 64 KiB.
func fuzzOffer(f *testing.F) *wire.Offer {
	b, err := json.Marshal(Offer{
		Name: "vm", Config: json.RawMessage("{}"), RAM: []memory.Range{{Size: 1 << 20}}, Layers: []Layer{{Size: 1 << 16}},
	})
	if err != nil {
		f.Fatal(err)
	}
	return &wire.Offer{JSON: b}
}

// FuzzSource lets a hostile source say anything to a destination: it never runs a
// guest whose memory did not come, and always ends.
func FuzzSource(f *testing.F) {
	hello := &wire.Hello{Digests: wire.DigestXXH3, StallMillis: 1000, Capabilities: wire.CanPostcopy}
	zero := wire.Finish(wire.AppendRun(wire.Begin(nil), wire.Run{Count: 256}), 0, wire.TypeZero, 0, 0)
	missing := wire.Finish(wire.AppendRun(wire.Begin(nil), wire.Run{Count: 256}), 0, wire.TypeMissing, 0, 0)
	name := wire.Finish(append(wire.AppendName(wire.Begin(nil), 3, 5, 0, 1), make([]byte, 16)...), 0, wire.TypeNames, 0, 0)
	equal := wire.Finish(wire.AppendDuplicate(wire.Begin(nil), wire.Duplicate{GFN: 1, Of: 2}), 0, wire.TypeDuplicates, 0, 0)
	raw := wire.FinishBytes(wire.AppendRun(wire.BeginBytes(nil), wire.Run{GFN: 7, Count: 1}), 0, wire.TypeRaw, memory.PageSize, 0, false)
	packed := wire.FinishBytes(wire.AppendRun(wire.BeginBytes(nil), wire.Run{GFN: 7, Count: 1}), 0, wire.TypeZstd, 5, 0, false)
	begin := messages(hello, fuzzOffer(f), &wire.Round{Number: 1, Stopped: true})
	last := messages(&wire.RoundEnd{Number: 1}, &wire.Section{Name: "cpu", Version: 1}, &wire.Prepare{Sections: 1}, &wire.Commit{})
	with := func(parts ...[]byte) (b []byte) {
		b = append(b, begin...)
		for _, p := range parts {
			b = append(b, p...)
		}
		return b
	}
	f.Add(with(zero, last))
	f.Add(with(name, equal, zero, messages(&wire.RoundEnd{Number: 1}), raw, make([]byte, memory.PageSize), last))
	f.Add(with(zero, packed, []byte("zstd!"), last))
	f.Add(with(missing, messages(&wire.RoundEnd{Number: 1}, &wire.Prepare{Postcopy: true}, &wire.Commit{})))
	f.Add(with(zero, messages(&wire.Verify{Digests: [][16]byte{{}}}, &wire.Fail{Reason: "no"})))
	f.Add(messages(&wire.Commit{}))
	w := newWorld(f, 16)
	f.Fuzz(func(t *testing.T, b []byte) {
		b = sealed(b)
		w := &world{t: t, layers: w.layers}
		h := &fakeHost{w: w}
		here, there := net.Pipe()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		go func() {
			_, _ = here.Write(wire.Preamble{Min: wire.MinVersion, Max: wire.Version, Role: wire.RoleControl}.Append(nil))
			go func() { _, _ = io.Copy(io.Discard, here) }()
			_, _ = here.Write(b)
			time.Sleep(5 * time.Millisecond) // it may have to say something
			_ = here.Close()
		}()
		first := true
		result, err := Receive(ctx, h, func(ctx context.Context) (net.Conn, error) {
			if first {
				first = false
				return there, nil
			}
			return nil, io.EOF
		}, ReceiveOptions{Stall: time.Second, HelloLimit: time.Second})
		if ctx.Err() != nil {
			t.Error("it did not end")
		}
		if result.Committed != h.runs() || (err == nil) != h.runs() {
			t.Errorf("committed %v, runs %v, %v", result.Committed, h.runs(), err)
		}
		if h.mem != nil && !h.runs() && h.abandoned != 1 {
			t.Errorf("freed %d times", h.abandoned)
		}
		if h.mem != nil {
			_ = h.mem.Close()
		}
	})
}

// FuzzDestination lets a hostile destination say anything to a source: the VM runs
// afterwards, or was committed after a destination said that it is ready.
func FuzzDestination(f *testing.F) {
	want := wire.Finish(wire.AppendRun(wire.Begin(nil), wire.Run{GFN: 3, Count: 2}), 0, wire.TypeWant, 0, 0)
	accept := &wire.Accept{StallMillis: 1000, Held: []byte{1}}
	good := messages(accept, &wire.RoundDone{Number: 1}, &wire.RoundDone{Number: 2}, &wire.Ready{}, &wire.Running{})
	f.Add(good)
	f.Add(append(append(messages(accept), want...), messages(&wire.RoundDone{Number: 1}, &wire.RoundDone{Number: 2}, &wire.Fail{Reason: "no disk"})...))
	f.Add(messages(&wire.Fail{Refused: true, Reason: "no"}))
	f.Add(messages(accept, &wire.RoundDone{Number: 2}))
	f.Add(messages(&wire.Running{}, accept, &wire.Ready{}))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = sealed(b)
		w := newWorld(t, 8)
		vm := newFakeVM(w, 1<<20)
		vm.startFirst()
		dialed := false
		dial := func(context.Context) (net.Conn, error) {
			if dialed {
				return nil, io.EOF
			}
			dialed = true
			here, there := net.Pipe()
			go func() {
				_, _ = wire.ReadPreamble(there)
				go func() { _, _ = io.Copy(io.Discard, there) }()
				_, _ = there.Write(wire.Welcome{Min: 1, Max: 1, Chosen: 1}.Append(nil))
				_, _ = there.Write(b)
				time.Sleep(5 * time.Millisecond)
				_ = there.Close()
			}()
			return here, nil
		}
		report, err := Send(t.Context(), vm, dial, Options{Stall: time.Second, OutcomeLimit: time.Millisecond})
		switch report.Outcome {
		case OutcomeNever:
			if err == nil || !vm.runs() {
				t.Errorf("it stays, %v, and runs: %v", err, vm.runs())
			}
		case OutcomeCommitted, OutcomeUnknown:
			if vm.runs() {
				t.Errorf("%s, and runs here", report.Outcome)
			}
		default:
			t.Errorf("outcome %s, %v", report.Outcome, err)
		}
		_ = vm.Pause(t.Context())
		_ = vm.mem.Close()
	})
}
