package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden bytes of the current version anew")

var token = Token{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}

// golden are messages of every type that has no pages.
var golden = map[string]Message{
	"hello": &Hello{
		Capabilities: CanPostcopy, Seed: 0x1122334455667788, Digests: DigestXXH3, Connections: 4, StallMillis: 30000, Ditto: "1.2",
	},
	"offer":      &Offer{JSON: []byte(`{"name":"web"}`)},
	"accept":     &Accept{Capabilities: CanPostcopy, StallMillis: 20000, Ditto: "1.3", Held: []byte{0b101, 1}},
	"fail":       &Fail{Refused: true, Reason: "no avx512f here"},
	"alive":      &Alive{Done: 1 << 33},
	"round":      &Round{Number: 3, Stopped: true, Pages: 77},
	"barrier":    &Barrier{Number: 3},
	"round-end":  &RoundEnd{Number: 3},
	"round-done": &RoundDone{Number: 3},
	"section":    &Section{Name: "cpu", Version: 1, Bytes: []byte{1, 2, 3}},
	"verify":     &Verify{GFN: 0x100000, Digests: [][DigestSize]byte{{1}, {15: 2}}},
	"prepare":    &Prepare{Sections: 12, Postcopy: true},
	"ready":      &Ready{},
	"commit":     &Commit{},
	"running":    &Running{Nanos: 56e6},
	"outcome":    &Answer{Outcome: OutcomeCommitted},
	"pulled":     &Pulled{},
	"images":     &Images{Images: []Image{{Disk: 1, Depth: 1, Floor: NoFloor}, {Disk: 1, Depth: 0, Floor: 1}}},
	"image-end":  &ImageEnd{Image: 1},
	"image-done": &ImageDone{Image: 1},
}

// goldenBytes are the bytes of everything that is sent.
func goldenBytes() map[string][]byte {
	all := map[string][]byte{
		"preamble": Preamble{Min: 1, Max: 1, Role: RoleData, Index: 2, Token: token}.Append(nil),
		"welcome":  Welcome{Min: 1, Max: 1, Chosen: 1}.Append(nil),
	}
	for name, m := range golden {
		all[name] = Append(nil, m)
	}
	runs := AppendRun(AppendRun(nil, Run{GFN: 0x10, Count: 2}), Run{GFN: 0x100000, Count: 1})
	for name, t := range map[string]Type{"zero": TypeZero, "want": TypeWant, "missing": TypeMissing} {
		all[name] = Finish(append(Begin(nil), runs...), 0, t, 0, 0)
	}
	blocks := AppendBlocks(nil, Blocks{Image: 2, Offset: 65536, Length: 512, Digest: [DigestSize]byte{0xd1, 15: 2}}, 512)
	all["blocks"] = append(blocks, bytes.Repeat([]byte{7}, 512)...)
	names := AppendName(Begin(nil), 0x20, 0x99, 3, 2)
	names = append(names, bytes.Repeat([]byte{0xd1}, 2*DigestSize)...)
	all["names"] = Finish(names, 0, TypeNames, 0, 0)
	all["duplicates"] = Finish(AppendDuplicate(Begin(nil), Duplicate{GFN: 9, Of: 4, Digest: [16]byte{0xee}}), 0, TypeDuplicates, 0, 0)
	raw := AppendRun(BeginBytes(nil), Run{GFN: 7, Count: 1})
	raw = FinishBytes(raw, 0, TypeRaw, PageSize, 0x0102030405060708, true)
	all["raw"] = append(raw, bytes.Repeat([]byte{0xaa}, PageSize)...)
	packed := AppendRun(BeginBytes(nil), Run{GFN: 7, Count: 1})
	packed = FinishBytes(packed, 0, TypeZstd, 5, 0, false)
	all["zstd"] = append(packed, "zstd!"...)
	request := append(AppendRequest(Begin(nil), 5), runs...)
	all["request"] = Finish(request, 0, TypeRequest, 0, 0)
	return all
}

// TestGolden: what the current version sends does not change unnoticed, and what
// a version sent is read as long as it is spoken.
func TestGolden(t *testing.T) {
	all := goldenBytes()
	if n := len(all); n != int(types)-1+2 {
		t.Errorf("%d golden texts for %d types and two greetings", n, types-1)
	}
	for name, got := range all {
		path := filepath.Join("testdata/golden1", name+".hex")
		if *update {
			if err := os.WriteFile(path, []byte(hex.Dump(got)), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatalf("%v; go test -update writes it", err)
		}
		if d := cmp.Diff(string(want), hex.Dump(got)); d != "" {
			t.Errorf("%s:\n%s", name, d)
		}
	}
}

// TestMessages: what is sent is what is read.
func TestMessages(t *testing.T) {
	var stream []byte
	var want []Message
	for _, m := range golden {
		stream, want = Append(stream, m), append(want, m)
	}
	r := NewReader(bytes.NewReader(stream))
	for _, m := range want {
		f, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		got := reflect.New(reflect.TypeOf(m).Elem()).Interface().(Message)
		if err := Parse(f, got); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(m, got); d != "" {
			t.Errorf("%s: %s", m.Type(), d)
		}
	}
	if _, err := r.Next(); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
}

// TestCut: bytes that end too early are an error, whatever they are of.
func TestCut(t *testing.T) {
	for name, all := range goldenBytes() {
		for n := range all {
			if err := readAny(name, all[:n]); err == nil {
				t.Errorf("%d of %d bytes of %q are accepted", n, len(all), name)
			}
		}
		if err := readAny(name, all); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestFlipped: a bit that changed is noticed, wherever a checksum is promised.
func TestFlipped(t *testing.T) {
	for name, all := range goldenBytes() {
		size := len(all)
		if name == "blocks" {
			size = HeaderSize + blocksSize
		}
		if name == "zstd" || name == "raw" { // payloads are summed by who reads them
			size = HeaderSize + 8 + RunSize
		}
		for bit := range 8 * size {
			changed := bytes.Clone(all)
			changed[bit/8] ^= 1 << (bit % 8)
			if err := readAny(name, changed); err == nil {
				t.Errorf("bit %d of %q changed, and nobody noticed", bit, name)
			}
		}
	}
}

// readAny reads golden bytes of a name as far as this package does.
func readAny(name string, b []byte) error {
	switch name {
	case "preamble":
		_, err := ReadPreamble(bytes.NewReader(b))
		return err
	case "welcome":
		_, err := ReadWelcome(bytes.NewReader(b), 1, 1)
		return err
	}
	r := NewReader(bytes.NewReader(b))
	f, err := r.Next()
	if err != nil {
		return err
	}
	return parseAny(r, f)
}

// parseAny takes a frame apart by its type, and reads its payload.
func parseAny(r *Reader, f Frame) error {
	for _, m := range golden {
		if m.Type() == f.Type {
			return Parse(f, reflect.New(reflect.TypeOf(m).Elem()).Interface().(Message))
		}
	}
	switch f.Type {
	case TypeZero, TypeWant, TypeMissing:
		_, _, err := ParseRuns(f)
		return err
	case TypeNames:
		return ParseNames(f, func(Name) error { return nil })
	case TypeDuplicates:
		return ParseDuplicates(f, func(Duplicate) error { return nil })
	case TypeRequest:
		_, err := ParseRequest(f)
		return err
	case TypeBlocks:
		if _, err := ParseBlocks(f); err != nil {
			return err
		}
		return r.ReadPayload(make([]byte, f.Payload))
	case TypeRaw, TypeZstd:
		if _, err := ParseBytes(f); err != nil {
			return err
		}
		return r.ReadPayload(make([]byte, f.Payload))
	}
	return errors.New("a type that nobody parses")
}

func TestRefused(t *testing.T) {
	frame := func(t Type, flags uint8, head []byte, payload int) []byte {
		return Finish(append(Begin(nil), head...), 0, t, flags, payload)
	}
	run := func(gfn uint64, count uint32) []byte { return AppendRun(nil, Run{GFN: gfn, Count: count}) }
	withSum := func(runs []byte) []byte { return append(make([]byte, 8), runs...) }
	for _, test := range []struct {
		name string
		b    []byte
		want string
	}{
		{"unknown type", frame(types, 0, nil, 0), "not known"},
		{"type zero", frame(0, 0, nil, 0), "not known"},
		{"unknown flag", frame(TypeRaw, 2, withSum(run(0, 1)), PageSize), "flags 0x2"},
		{"flag without payload", frame(TypeAlive, FlagSum, make([]byte, 8), 0), "has flags"},
		{"payload that is none", frame(TypeAlive, 0, make([]byte, 8), 1), "more than"},
		{"huge payload", frame(TypeRaw, 0, withSum(run(0, 1)), MaxPayload+1), "more than"},
		{"no runs", frame(TypeZero, 0, nil, 0), "0 bytes of runs"},
		{"half a run", frame(TypeZero, 0, run(0, 1)[:11], 0), "11 bytes of runs"},
		{"empty run", frame(TypeZero, 0, run(5, 0), 0), "0 pages"},
		{"run that overflows", frame(TypeZero, 0, run(1<<64-1, 2), 0), "pages from"},
		{"run beyond", frame(TypeWant, 0, run(maxGFN-1, 2), 0), "pages from"},
		{"raw of too many", frame(TypeRaw, 0, withSum(run(0, MaxBatch+1)), MaxPayload), "more than"},
		{"raw of too few bytes", frame(TypeRaw, 0, withSum(run(0, 2)), PageSize), "for 2 pages"},
		{"raw without sum", frame(TypeRaw, 0, run(0, 1)[:7], PageSize), "too short"},
		{"untold sum", frame(TypeRaw, 0, append([]byte{1, 0, 0, 0, 0, 0, 0, 0}, run(0, 1)...), PageSize), "do not tell"},
		{"zstd that is larger", frame(TypeZstd, 0, withSum(run(0, 1)), PageSize), "for 1 pages"},
		{"zstd of nothing", frame(TypeZstd, 0, withSum(run(0, 1)), 0), "for 1 pages"},
		{"name of no page", frame(TypeNames, 0, AppendName(nil, 1, 1, 1, 0), 0), "0 pages"},
		{"name without digests", frame(TypeNames, 0, AppendName(nil, 1, 1, 1, 1), 0), "too short"},
		{"name of a far block", frame(TypeNames, 0, AppendName(nil, 1, maxBlock, 1, 1), 0), "block"},
		{"name of a far layer", frame(TypeNames, 0, AppendName(nil, 1, 1, MaxLayers, 1), 0), "layer"},
		{"half a duplicate", frame(TypeDuplicates, 0, make([]byte, 31), 0), "31 bytes"},
		{"duplicate of itself", frame(TypeDuplicates, 0, AppendDuplicate(nil, Duplicate{GFN: 3, Of: 3}), 0), "as page"},
		{"hello of many connections", Append(nil, &Hello{Digests: DigestXXH3, Connections: MaxConnections + 1}), "data connections"},
		{"hello of unknown digests", Append(nil, &Hello{Digests: 9}), "digests 9"},
		{"accept of many layers", Append(nil, &Accept{Held: make([]byte, MaxLayers/8+1)}), "layers"},
		{"prepare of many sections", Append(nil, &Prepare{Sections: MaxSections + 1}), "sections"},
		{"outcome that is none", Append(nil, &Answer{Outcome: outcomes}), "outcome 4"},
		{"fail that is neither", frame(TypeFail, 0, []byte{2, 0, 0}, 0), "neither"},
		{"text that is none", frame(TypeFail, 0, []byte{0, 1, 0, 0xff}, 0), "UTF-8"},
		{"text that is too long", frame(TypeFail, 0, append([]byte{0, 1, 9}, make([]byte, 0x901)...), 0), "longer"},
		{"bytes behind", frame(TypeFail, 0, []byte{0, 0, 0, 7}, 0), "1 bytes too long"},
	} {
		r := NewReader(bytes.NewReader(append(test.b, make([]byte, PageSize)...)))
		f, err := r.Next()
		if err == nil {
			err = parseAny(r, f)
		}
		if err == nil || !strings.Contains(err.Error(), test.want) || !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v does not say %q", test.name, err, test.want)
		}
	}
}

// TestLengthFirst: a header that promises too much is refused before memory is
// taken for it.
func TestLengthFirst(t *testing.T) {
	h := Finish(Begin(nil), 0, TypeOffer, 0, 0)
	h[11] = 0xff // of the length of the head
	r := NewReader(bytes.NewReader(h))
	if _, err := r.Next(); err == nil || cap(r.head) != 0 {
		t.Errorf("%v, and %d bytes were taken", err, cap(r.head))
	}
}

func TestPayload(t *testing.T) {
	r := NewReader(bytes.NewReader(goldenBytes()["raw"]))
	f, err := r.Next()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Next(); err == nil {
		t.Error("the next frame was read before the payload of this one")
	}
	if err := r.ReadPayload(make([]byte, f.Payload+1)); err == nil {
		t.Error("more was read than there is")
	}
	if err := r.ReadPayload(make([]byte, f.Payload)); err != nil {
		t.Error(err)
	}
}

func TestNegotiation(t *testing.T) {
	for _, test := range []struct {
		theirMin, theirMax, min, max, want uint16
		advice                             string
	}{
		{1, 1, 1, 1, 1, ""},
		{1, 2, 1, 1, 1, ""}, // a newer source
		{1, 1, 1, 2, 1, ""}, // a newer destination
		{2, 3, 1, 2, 2, ""},
		{1, 9, 4, 5, 5, ""},
		{3, 4, 1, 2, 0, "update ditto here"},
		{1, 2, 3, 4, 0, "update ditto there"},
	} {
		p := Preamble{Min: test.theirMin, Max: test.theirMax}
		got, err := p.Choose(test.min, test.max)
		if got != test.want || (err != nil) != (test.want == 0) {
			t.Errorf("%+v: version %d, %v", test, got, err)
		}
		if err != nil && (!errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), test.advice)) {
			t.Errorf("%+v: %v", test, err)
		}
		// What the other side makes of the answer.
		w := Welcome{Min: test.min, Max: test.max, Chosen: got}
		if err != nil {
			w.Status = StatusVersion
		}
		_, err = ReadWelcome(bytes.NewReader(w.Append(nil)), test.theirMin, test.theirMax)
		if (err != nil) != (test.want == 0) {
			t.Errorf("%+v: the answer is %v", test, err)
		}
	}
}

func TestWelcome(t *testing.T) {
	for _, test := range []struct {
		w    Welcome
		want error
	}{
		{Welcome{Min: 1, Max: 1, Status: StatusBusy}, &StatusError{StatusBusy}},
		{Welcome{Min: 1, Max: 1, Chosen: 2}, ErrNotDitto},
		{Welcome{Min: 1, Max: 1, Chosen: 0}, ErrNotDitto},
	} {
		_, err := ReadWelcome(bytes.NewReader(test.w.Append(nil)), 1, 1)
		var status *StatusError
		if errors.As(test.want, &status) {
			if !errors.As(err, &status) || status.Status != test.w.Status {
				t.Errorf("%+v: %v", test.w, err)
			}
		} else if !errors.Is(err, test.want) {
			t.Errorf("%+v: %v", test.w, err)
		}
	}
}

// TestStrangers: who begins otherwise is known by the first bytes.
func TestStrangers(t *testing.T) {
	for _, hello := range []string{"GET / HTTP/1.1\r\n\r\n", "SSH-2.0-OpenSSH_9.9\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc", strings.Repeat("\x00", 40)} {
		r := strings.NewReader(hello)
		if _, err := ReadPreamble(r); !errors.Is(err, ErrNotDitto) {
			t.Errorf("%q: %v", hello, err)
		}
		if read := len(hello) - r.Len(); read > 8 {
			t.Errorf("%q: %d bytes were read", hello, read)
		}
	}
}

func TestText(t *testing.T) {
	long := strings.Repeat("ä", MaxText)
	for _, text := range []string{"", "why", long, "\xff\xfe", "x" + long} {
		f, err := NewReader(bytes.NewReader(Append(nil, &Fail{Reason: text}))).Next()
		if err != nil {
			t.Fatal(err)
		}
		var got Fail
		if err := Parse(f, &got); err != nil || len(text) > 0 && got.Reason == "" {
			t.Errorf("a text of %d bytes: %v", len(text), err)
		}
	}
}

func TestOutcomeText(t *testing.T) {
	for o := range outcomes {
		b, _ := o.MarshalText()
		var back Outcome
		if err := back.UnmarshalText(b); err != nil || back != o {
			t.Errorf("%s: %v, %v", b, back, err)
		}
	}
	var back Token
	b, _ := token.MarshalText()
	if err := back.UnmarshalText(b); err != nil || back != token {
		t.Errorf("%s: %v, %v", b, back, err)
	}
	for _, bad := range []string{"", "00", strings.Repeat("g", 32)} {
		if err := back.UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("%q is a token", bad)
		}
	}
}

// TestReaderAllocates nothing for frames of pages, once it has read one.
func TestReaderAllocates(t *testing.T) {
	frame := goldenBytes()["raw"]
	source := &repeat{b: frame}
	r := NewReader(source)
	payload := make([]byte, PageSize)
	if n := testing.AllocsPerRun(100, func() {
		f, err := r.Next()
		if err == nil {
			_, err = ParseBytes(f)
		}
		if err == nil {
			err = r.ReadPayload(payload)
		}
		if err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations a frame", n)
	}
}

// repeat reads the same bytes over and over.
type repeat struct {
	b  []byte
	at int
}

func (r *repeat) Read(p []byte) (int, error) {
	n := copy(p, r.b[r.at:])
	r.at = (r.at + n) % len(r.b)
	return n, nil
}
