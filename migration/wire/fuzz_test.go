package wire

import (
	"bytes"
	"errors"
	"io"
	"reflect"
	"testing"
)

// FuzzFrames reads a stream of frames. Bytes of a frame are sealed anew, so that
// the checksum does not hide the decoders; what a decoder accepts is the same
// again after it was sent and read.
func FuzzFrames(f *testing.F) {
	f.Add(AppendBlocks(nil, Blocks{Image: 1, Zeros: true, Offset: 1 << 33, Length: 1 << 20}, 0), true)
	for _, b := range goldenBytes() {
		f.Add(b, true)
		f.Add(b, false)
	}
	f.Fuzz(func(t *testing.T, b []byte, seal bool) {
		if seal {
			b = resealed(b)
		}
		r := NewReader(bytes.NewReader(b))
		for {
			frame, err := r.Next()
			if err != nil {
				if !errors.Is(err, ErrFormat) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("%v says not what is wrong", err)
				}
				return
			}
			checkFrame(t, frame)
			if err := r.ReadPayload(make([]byte, frame.Payload)); err != nil {
				return
			}
		}
	})
}

// resealed returns frames with right checksums, as long as headers make sense.
func resealed(b []byte) []byte {
	b = bytes.Clone(b)
	for at := 0; at+HeaderSize <= len(b); {
		head := int(b[at+8]) | int(b[at+9])<<8 | int(b[at+10])<<16
		payload := int(b[at+12]) | int(b[at+13])<<8 | int(b[at+14])<<16
		end := at + HeaderSize + head
		if end > len(b) {
			break
		}
		Finish(b[:end], at, Type(b[at+4]), b[at+5], payload)
		at = end + payload
	}
	return b
}

// checkFrame parses a frame as its type and holds the result to what is promised.
func checkFrame(t *testing.T, f Frame) {
	for _, m := range golden {
		if m.Type() != f.Type {
			continue
		}
		got := reflect.New(reflect.TypeOf(m).Elem()).Interface().(Message)
		if Parse(f, got) != nil {
			return
		}
		again, err := NewReader(bytes.NewReader(Append(nil, got))).Next()
		if err != nil || !bytes.Equal(again.Head, f.Head) {
			t.Errorf("%s: %x became %x, %v", f.Type, f.Head, again.Head, err)
		}
		return
	}
	checkRuns := func(runs Runs, want uint64) {
		pages := uint64(0)
		for i := range runs.Len() {
			run := runs.At(i)
			if run.Count == 0 || run.GFN+uint64(run.Count) > maxGFN || run.GFN >= maxGFN {
				t.Errorf("%s: run %+v", f.Type, run)
			}
			pages += uint64(run.Count)
		}
		if pages != want {
			t.Errorf("%s: %d pages, not %d", f.Type, pages, want)
		}
	}
	switch f.Type {
	case TypeZero, TypeWant, TypeMissing:
		if runs, pages, err := ParseRuns(f); err == nil {
			checkRuns(runs, pages)
		}
	case TypeRaw, TypeZstd:
		if m, err := ParseBytes(f); err == nil {
			checkRuns(m.Runs, uint64(m.Pages))
			if m.Pages > MaxBatch {
				t.Errorf("%d pages", m.Pages)
			}
		}
	case TypeBlocks:
		if m, err := ParseBlocks(f); err == nil {
			if m.Image >= MaxImages || m.Length == 0 || m.Zeros == (f.Payload > 0) || m.Offset+m.Length > maxDisk {
				t.Errorf("blocks %+v", m)
			}
			if again := AppendBlocks(nil, m, f.Payload); !bytes.Equal(again[HeaderSize:], f.Head) {
				t.Errorf("%+v is not %x", m, f.Head)
			}
		}
	case TypeRequest:
		if m, err := ParseRequest(f); err == nil {
			checkRuns(m.Runs, m.Pages)
		}
	case TypeNames:
		_ = ParseNames(f, func(n Name) error {
			if !n.sane() || len(n.Digests) != int(n.Count)*DigestSize || n.Layer >= MaxLayers {
				t.Errorf("name %+v", n)
			}
			return nil
		})
	case TypeDuplicates:
		_ = ParseDuplicates(f, func(d Duplicate) error {
			if d.GFN == d.Of || d.GFN >= maxGFN || d.Of >= maxGFN {
				t.Errorf("duplicate %+v", d)
			}
			return nil
		})
	default:
		t.Errorf("%s is parsed by nobody", f.Type)
	}
}

// FuzzNegotiation lets a stranger greet and answer: whatever is accepted is a
// version that both sides speak, and the same bytes again.
func FuzzNegotiation(f *testing.F) {
	f.Add(goldenBytes()["preamble"], goldenBytes()["welcome"], uint16(1), uint16(1))
	f.Add([]byte("GET / HTTP/1.0\r\n\r\n"), []byte("SSH-2.0"), uint16(1), uint16(2))
	f.Fuzz(func(t *testing.T, preamble, welcome []byte, minimum, maximum uint16) {
		if p, err := ReadPreamble(bytes.NewReader(preamble)); err == nil {
			if !bytes.Equal(p.Append(nil), preamble[:PreambleSize]) {
				t.Errorf("%+v is not %x", p, preamble)
			}
			if v, err := p.Choose(minimum, maximum); err == nil && (v < p.Min || v > p.Max || v < minimum || v > maximum) {
				t.Errorf("version %d of %+v and %d to %d", v, p, minimum, maximum)
			}
		}
		if w, err := ReadWelcome(bytes.NewReader(welcome), minimum, maximum); err == nil {
			if w.Chosen < minimum || w.Chosen > maximum || w.Status != StatusOK || !bytes.Equal(w.Append(nil), welcome[:WelcomeSize]) {
				t.Errorf("%+v for %d to %d", w, minimum, maximum)
			}
		}
	})
}
