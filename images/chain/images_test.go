package chain

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ditto.vm/images/disk"
)

// TestImagesOfQEMU opens what qemu-img makes, compressed and not, and reads
// what qemu-img reads.
func TestImagesOfQEMU(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "source.raw")
	rng := rand.New(rand.NewSource(1))
	want := makeBase(t, source, rng, 4<<20)
	for i := range want[:2<<20] {
		want[i] = byte(i >> 12) // compresses well
	}
	if err := os.WriteFile(source, want, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, o := range []string{
		"", "compression_type=zstd", "cluster_size=512", "cluster_size=512,compression_type=zstd", "cluster_size=2M",
		"cluster_size=2M,compression_type=zstd", "compat=0.10", "compat=0.10,cluster_size=4k", "refcount_bits=64", "refcount_bits=1",
	} {
		for _, compressed := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s,compressed=%v", o, compressed), func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "disk")
				args := []string{"convert", "-f", "raw", "-O", "qcow2"}
				if compressed {
					args = append(args, "-c")
				}
				if o != "" {
					args = append(args, "-o", o)
				}
				tool(t, "qemu-img", append(args, source, path)...)
				c := openChain(t, path, Options{ReadOnly: true})
				if !bytes.Equal(readAll(t, c), want) {
					t.Error("it reads as something else")
				}
				if err := c.Close(); err != nil {
					t.Fatal(err)
				}
				// And it is written: over compressed clusters, too.
				w := twin{c: openChain(t, path, Options{}), model: bytes.Clone(want)}
				for i := range 100 {
					if err := w.step(rng); err != nil {
						t.Fatalf("step %d: %v", i, err)
					}
				}
				w.compare(t)
			})
		}
	}
}

// TestDepth reads and writes a chain of mixed images, five deep, and QEMU's
// tools agree.
func TestDepth(t *testing.T) {
	dir := t.TempDir()
	at := func(i int) string { return filepath.Join(dir, fmt.Sprint("layer", i)) }
	rng := rand.New(rand.NewSource(1))
	const step = 1 << 20
	w := twin{model: makeBase(t, at(0), rng, step)}
	format := "raw"
	for i, o := range []string{"cluster_size=512", "compat=0.10", "cluster_size=2M", "compression_type=zstd", "refcount_bits=8"} {
		// Each is longer than what it is on.
		size := (i + 2) * step
		name := filepath.Base(at(i))
		if i%2 == 1 {
			name = at(i)
		}
		tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", o, "-b", name, "-F", format, at(i+1), fmt.Sprint(size))
		format = "qcow2"
		w.model = append(w.model, make([]byte, step)...)
		w.c = openChain(t, at(i+1), Options{})
		if n := len(w.c.Layers()); n != i+2 {
			t.Fatalf("%d layers of %d: %s", n, i+2, w.c)
		}
		for k := range 100 {
			if err := w.step(rng); err != nil {
				t.Fatalf("layer %d, step %d: %v", i+1, k, err)
			}
		}
		w.compare(t)
	}
}

// TestResize grows images, also beyond what is below them, and by QEMU's eyes.
func TestResize(t *testing.T) {
	for _, o := range []string{"cluster_size=4k", "cluster_size=64k", "cluster_size=4k,compat=0.10"} {
		dir := t.TempDir()
		rng := rand.New(rand.NewSource(1))
		base := makeBase(t, filepath.Join(dir, "base"), rng, 8<<20)
		path := filepath.Join(dir, "top")
		tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", o, "-b", "base", "-F", "raw", path, "1M")
		w := twin{c: openChain(t, path, Options{}), model: bytes.Clone(base[:1<<20])}
		for _, mib := range []int{2, 3, 9, 40} {
			if err := w.c.Resize(int64(mib) << 20); err != nil {
				t.Fatal(err)
			}
			w.model = append(w.model, make([]byte, mib<<20-len(w.model))...)
			for range 40 {
				if err := w.step(rng); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := w.c.Resize(1 << 20); err == nil {
			t.Error("the disk was shrunk")
		}
		w.compare(t)
	}
}

// TestRefuses: each error is one line that names what is wrong and how to go
// on.
func TestRefuses(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	create := func(name string, args ...string) {
		tool(t, "qemu-img", append(append([]string{"create", "-q", "-f", "qcow2"}, args...), at(name), "1M")...)
	}
	patch := func(name string, offset int64, b ...byte) {
		t.Helper()
		create(name)
		f, err := os.OpenFile(at(name), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteAt(b, offset)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	create("base")
	create("data_file", "-o", "data_file="+at("data"))
	create("extended_l2", "-o", "extended_l2=on,cluster_size=128k")
	create("luks", "--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10")
	create("loop", "-b", at("base"), "-F", "qcow2")
	tool(t, "qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "loop", "-F", "qcow2", at("loop"))
	create("unnamed", "-b", at("base"), "-F", "qcow2")
	tool(t, "qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", at("unnamed"))
	create("missing", "-b", at("base"), "-F", "qcow2")
	tool(t, "qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "gone", "-F", "qcow2", at("missing"))
	create("url", "-b", at("base"), "-F", "qcow2")
	tool(t, "qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "nbd://host/x", "-F", "raw", at("url"))
	create("vmdk", "-b", at("base"), "-F", "qcow2")
	tool(t, "qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "base", "-F", "vmdk", at("vmdk"))
	create("snapshot")
	tool(t, "qemu-img", "snapshot", "-c", "one", at("snapshot"))
	create("bitmap")
	tool(t, "qemu-img", "bitmap", "--add", at("bitmap"), "b")
	patch("unknown", 79, 0x20)
	patch("corrupt", 79, 2)
	patch("version", 7, 4)
	patch("clusters", 23, 30)
	patch("l1", 40, 0xff)
	patch("reftable", 56, 0xff)
	patch("aes", 35, 1)
	patch("compression", 104, 9)
	for _, c := range []struct{ name, want string }{
		{"data_file", "external data file"}, {"extended_l2", "extended L2"}, {"luks", "encrypted (LUKS)"}, {"loop", "in use"},
		{"missing", "does not exist"}, {"url", "not a path"}, {"vmdk", `format "vmdk"`}, {"snapshot", "internal snapshots"},
		{"bitmap", "persistent bitmaps"}, {"unknown", "bit 5"}, {"corrupt", "marked corrupt"}, {"version", "version 4"},
		{"clusters", "cluster size"}, {"l1", "L1 table"}, {"reftable", "refcount table"}, {"aes", "encrypted (AES)"},
	} {
		chain, err := Open(at(c.name), Options{})
		if err == nil {
			_ = chain.Close()
		}
		var e *disk.Error
		if !errors.As(err, &e) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") || e.Cure == "" || e.Path == "" {
			t.Errorf("%s: %v, want one line with %q and a cure", c.name, err, c.want)
		}
	}
	if _, err := Open(at("loop"), Options{ReadOnly: true}); err == nil || !strings.Contains(err.Error(), "below itself") {
		t.Errorf("loop: %v", err)
	}
	for _, name := range []string{"snapshot", "bitmap", "corrupt"} {
		c, err := Open(at(name), Options{ReadOnly: true})
		if err != nil {
			t.Errorf("%s, read-only: %v", name, err)
			continue
		}
		_ = c.Close()
	}
}

// TestUnsaidFormat: the format of a backing file is never guessed.
func TestUnsaidFormat(t *testing.T) {
	dir := t.TempDir()
	base, path := filepath.Join(dir, "base"), filepath.Join(dir, "top")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
	if err := CreateOverlay(path, base, Qcow2, 1<<20); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// An unknown extension in the place of the format.
	at := bytes.Index(b, []byte{0xe2, 0x79, 0x2a, 0xca})
	b[at] = 0x12
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, Options{}); err == nil || !strings.Contains(err.Error(), "does not say which format") || !strings.Contains(err.Error(), "ditto image rebase --unsafe") {
		t.Errorf("%v", err)
	}
}

// TestDirtyImage: QEMU died while it wrote with lazy refcounts.
func TestDirtyImage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "8M")
	_, _ = status(t, "qemu-io", "-f", "qcow2", "-c", "write -P 7 0 3M", "-c", "flush", "-c", "sigraise 9", path)
	if _, code := status(t, "qemu-img", "check", "-f", "qcow2", path); code == 0 {
		t.Skip("this qemu-io left a clean image")
	}
	w := twin{c: openChain(t, path, Options{}), model: make([]byte, 8<<20)}
	for i := range 3 << 20 {
		w.model[i] = 7
	}
	rng := rand.New(rand.NewSource(1))
	for range 100 {
		if err := w.step(rng); err != nil {
			t.Fatal(err)
		}
	}
	w.compare(t)
}
