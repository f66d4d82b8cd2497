package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"
)

// writer writes members of a tar file. Package tar has no way to write files with
// holes: those are written in the form that GNU tar calls 1.0, as an extended
// header, the list of what the file stores, and that.
type writer struct {
	out  io.Writer
	tar  *tar.Writer
	time time.Time // of all members
}

func newWriter(out io.Writer, t time.Time) *writer {
	return &writer{out: out, tar: tar.NewWriter(out), time: t.Truncate(time.Second)}
}

func (w *writer) header(name string, size int64) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o600, ModTime: w.time}
}

// bytes writes a member that is in memory.
func (w *writer) bytes(name string, b []byte) error {
	if err := w.tar.WriteHeader(w.header(name, int64(len(b)))); err != nil {
		return err
	}
	_, err := w.tar.Write(b)
	return err
}

// file writes a file of size bytes. moved hears of holes, too.
func (w *writer) file(ctx context.Context, name string, f *os.File, size int64, moved func(int64)) error {
	all := extentsOf(f, size)
	if len(all) == 1 && all[0] == (extent{0, size}) {
		if err := w.tar.WriteHeader(w.header(name, size)); err != nil {
			return err
		}
		return readExtent(ctx, w.tar, f, all[0], moved)
	}
	// What was written last is filled up.
	if err := w.tar.Flush(); err != nil {
		return err
	}
	list := sparseList(all)
	stored := int64(len(list))
	for _, e := range all {
		stored += e.end - e.start
	}
	if _, err := w.out.Write(append(w.sparseHeader(name, size, stored), list...)); err != nil {
		return err
	}
	at := int64(0)
	for _, e := range all {
		moved(e.start - at)
		if err := readExtent(ctx, w.out, f, e, moved); err != nil {
			return err
		}
		at = e.end
	}
	moved(size - at)
	_, err := w.out.Write(make([]byte, -stored&(block-1)))
	return err
}

func (w *writer) close() error { return w.tar.Close() }

// block is what everything in a tar file is a multiple of.
const block = 512

// sparseList is the list of extents, in whole blocks.
func sparseList(all []extent) []byte {
	b := fmt.Appendf(nil, "%d\n", len(all))
	for _, e := range all {
		b = fmt.Appendf(b, "%d\n%d\n", e.start, e.end-e.start)
	}
	return append(b, make([]byte, -len(b)&(block-1))...)
}

// sparseHeader is the two headers of a file with holes that takes stored bytes.
func (w *writer) sparseHeader(name string, size, stored int64) []byte {
	var records []byte
	for _, r := range [][2]string{
		{"GNU.sparse.major", "1"}, {"GNU.sparse.minor", "0"}, {"GNU.sparse.name", name},
		{"GNU.sparse.realsize", strconv.FormatInt(size, 10)}, {"size", strconv.FormatInt(stored, 10)},
	} {
		records = append(records, paxRecord(r[0], r[1])...)
	}
	b := w.block("GNUSparseFile.0/holes", tar.TypeXHeader, int64(len(records)))
	b = append(b, records...)
	b = append(b, make([]byte, -len(b)&(block-1))...)
	return append(b, w.block("GNUSparseFile.0/file", tar.TypeReg, stored)...)
}

// paxRecord is one record of an extended header: its own length in digits comes
// first.
func paxRecord(key, value string) string {
	rest := " " + key + "=" + value + "\n"
	n := len(rest) + 1
	for len(strconv.Itoa(n))+len(rest) != n {
		n = len(strconv.Itoa(n)) + len(rest)
	}
	return strconv.Itoa(n) + rest
}

// block is a header as POSIX 1003.1 has it. A size that it cannot hold is in the
// extended header before it.
func (w *writer) block(name string, kind byte, size int64) []byte {
	b := make([]byte, block)
	put := func(at, n int, text string) { copy(b[at:at+n], text) }
	octal := func(at, n int, value int64) { put(at, n, fmt.Sprintf("%0*o", n-1, value)) }
	put(0, 100, name)
	octal(100, 8, 0o600)
	octal(108, 8, 0)
	octal(116, 8, 0)
	octal(124, 12, min(size, 1<<33-1))
	octal(136, 12, max(0, w.time.Unix()))
	put(148, 8, "        ")
	b[156] = kind
	put(257, 8, "ustar\x0000")
	sum := int64(0)
	for _, c := range b {
		sum += int64(c)
	}
	put(148, 8, fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// reader reads members of a tar file, which must come in the order that is asked
// for.
type reader struct{ tar *tar.Reader }

// next begins the next member, which must be the file name, and returns its
// size.
func (r *reader) next(name string) (int64, error) {
	h, err := r.tar.Next()
	if err != nil {
		return 0, damaged(name, err)
	}
	if h.Typeflag != tar.TypeReg || h.Name != name {
		return 0, formatError("%q stands where the file %s should", h.Name, name)
	}
	return h.Size, nil
}

// bytes reads the next member, which must be the file name of at most so many
// bytes.
func (r *reader) bytes(name string, most int64) ([]byte, error) {
	size, err := r.next(name)
	if err != nil {
		return nil, err
	}
	if size > most {
		return nil, formatError("%s of %d bytes is larger than %d", name, size, most)
	}
	var b bytes.Buffer
	if n, err := io.Copy(&b, r.tar); err != nil || n != size {
		return nil, damaged(name, err)
	}
	return b.Bytes(), nil
}
