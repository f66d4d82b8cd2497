package disk

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestContainer: any length, growth, zeros behind the end, and structures at
// any alignment in every cache mode.
func TestContainer(t *testing.T) {
	for _, cache := range []Cache{CacheWriteback, CacheNone, CacheWritethrough} {
		path := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(path, []byte("QFI\xfb and an odd length"), 0o600); err != nil {
			t.Fatal(err)
		}
		r := open(t, path, Options{Container: true, Cache: cache})
		head := make([]byte, 30)
		if err := r.ReadBuffered(head, 3); err != nil || string(bytes.TrimRight(head, "\x00")) != "\xfb and an odd length" {
			t.Errorf("%s: read %q, %v", cache, head, err)
		}
		block := bytes.Repeat([]byte{0xff}, 4096)
		if err := r.ReadAtv([][]byte{block[:512], block[512:]}, 0); err != nil || string(block[:4]) != "QFI\xfb" || block[4095] != 0 {
			t.Errorf("%s: read %q, %v", cache, block[:30], err)
		}
		if err := r.WriteBuffered([]byte("far"), 10001); err != nil {
			t.Fatal(err)
		}
		if n, err := r.Length(); n != 10004 || err != nil {
			t.Errorf("%s: %d bytes long, %v", cache, n, err)
		}
	}
}

// TestReadWhileGrowing reads beyond the end of a container while it grows:
// there are zeros or what was written, and no error.
func TestReadWhileGrowing(t *testing.T) {
	const block, blocks = 4096, 2000
	for _, cache := range []Cache{CacheWriteback, CacheNone} {
		path := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		r := open(t, path, Options{Container: true, Cache: cache})
		written := make(chan error)
		go func() {
			data := r.buffer(block)
			for i := range data {
				data[i] = 7
			}
			var err error
			for i := range blocks {
				err = errors.Join(err, r.WriteAtv([][]byte{data}, int64(i+1)*block))
			}
			written <- err
		}()
		for name, q := range queues(t, r) {
			for i := range blocks {
				at := int64(i+1) * block
				buf := r.buffer(2 * block)
				q.Read(0, [][]byte{buf}, at)
				if err := one(q); err != nil {
					t.Fatalf("%s, %s: block %d: %v", cache, name, i, err)
				}
				if b := buf[0]; b != 0 && b != 7 {
					t.Fatalf("%s, %s: block %d reads %d", cache, name, i, b)
				}
			}
		}
		if err := <-written; err != nil {
			t.Fatal(err)
		}
	}
}
