package storage

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// contentFile holds the bytes of writeContent, sumLine says what they are.
const (
	contentFile = "content"
	sumLine     = "SUM %s %x\n"
)

// writeContent writes a file through the file system of every disk, and tells
// the digest of what it wrote and of what it reads back from the disk. Job
// words: bytes, seed, disks (how many).
func writeContent(args guestArgs) error {
	for i := range args.number("disks") {
		dev := fmt.Sprintf("/dev/vd%c", 'a'+rune(i))
		dir, err := mountExt4(dev, "")
		if err != nil {
			return err
		}
		path := filepath.Join(dir, contentFile)
		written, err := writeRandom(path, args.number("bytes"), args.number("seed")+i)
		if err != nil {
			return err
		}
		fmt.Printf(sumLine, "written", written)
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
			return err
		}
		read, err := digest(path)
		if err != nil {
			return err
		}
		fmt.Printf(sumLine, "read", read)
		if err := unix.Unmount(dir, 0); err != nil {
			return err
		}
	}
	return nil
}

// writeRandom writes n random bytes in pieces of uneven length, and flushes.
func writeRandom(path string, n, seed uint64) ([]byte, error) {
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	h := sha256.New()
	var key [32]byte
	key[0] = byte(seed)
	rng := rand.NewChaCha8(key)
	buf := make([]byte, 1<<20)
	for left := n; left > 0; {
		piece := buf[:min(left, 1+rng.Uint64()%uint64(len(buf)))]
		_, _ = rng.Read(piece) // never fails
		_, _ = h.Write(piece)
		if _, err := f.Write(piece); err != nil {
			return nil, err
		}
		left -= uint64(len(piece))
	}
	return h.Sum(nil), errors.Join(f.Sync(), f.Close())
}

// digest reads a file.
func digest(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	return h.Sum(nil), err
}

// eraseStep tells the host that it may look at the images; it answers with a
// line.
const eraseStep = "STEP "

// step waits until the host has looked.
func step(name string) error {
	fmt.Printf("\n%s%s\n", eraseStep, name)
	_, err := readLine()
	return err
}

// eraseAll fills two disks and erases them: the first is a file system that is
// trimmed, the second is erased by the three requests there are. Job words:
// bytes, to write to each disk.
func eraseAll(args guestArgs) error {
	n := args.number("bytes")
	dir, err := mountExt4("/dev/vda", "")
	if err != nil {
		return err
	}
	path := filepath.Join(dir, contentFile)
	if _, err := writeRandom(path, n, 1); err != nil {
		return err
	}
	raw, err := os.OpenFile("/dev/vdb", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer raw.Close()
	fill := func() error {
		buf := []byte(strings.Repeat("ditto***", 1<<17))
		for at := int64(0); at < int64(n); at += int64(len(buf)) {
			if _, err := raw.WriteAt(buf, at); err != nil {
				return err
			}
		}
		return raw.Sync()
	}
	if err := errors.Join(fill(), step("filled")); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return err
	}
	unix.Sync() // the space is free when the journal has it
	trimmed, err := trim(dir)
	if err != nil {
		return fmt.Errorf("fstrim: %w", err)
	}
	fmt.Printf("trimmed %d\n", trimmed)
	if err := discard(raw, 0, n); err != nil {
		return fmt.Errorf("discard: %w", err)
	}
	if err := step("discarded"); err != nil {
		return err
	}
	// Zeroes that may be holes, as `blkdiscard --zeroout` asks for.
	if err := errors.Join(fill(), unix.Fallocate(int(raw.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, int64(n))); err != nil {
		return fmt.Errorf("punch: %w", err)
	}
	if err := errors.Join(allZero(raw, n), step("punched")); err != nil {
		return err
	}
	// Zeroes that keep their space.
	if err := errors.Join(fill(), unix.Fallocate(int(raw.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, 0, int64(n))); err != nil {
		return fmt.Errorf("zero: %w", err)
	}
	return errors.Join(allZero(raw, n), step("zeroed"), unix.Unmount(dir, 0))
}

// allZero reads the disk, not the page cache, and finds zeros.
func allZero(f *os.File, n uint64) error {
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for at := int64(0); at < int64(n); at += int64(len(buf)) {
		if _, err := f.ReadAt(buf, at); err != nil {
			return err
		}
		for i, b := range buf {
			if b != 0 {
				return fmt.Errorf("%#x at %d, want zeros", b, at+int64(i))
			}
		}
	}
	return nil
}

// holdDisk reads the beginning of its disk, says so, tries to write to it, and
// holds it until a line is typed.
func holdDisk(guestArgs) error {
	f, err := os.OpenFile("/dev/vda", os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	head := make([]byte, 16)
	if _, err := io.ReadFull(f, head); err != nil {
		return err
	}
	fmt.Printf("\nHEAD %s\n", strings.TrimRight(string(head), "\x00"))
	if err := rewrite("/dev/vda", head); err != nil {
		fmt.Printf("\nREADONLY %v\n", err)
	} else {
		fmt.Printf("\nWRITABLE\n")
	}
	return step("held")
}

// rewrite writes the beginning of a disk as it is. Linux lets a disk that cannot
// be written be opened for writing, but not written.
func rewrite(path string, head []byte) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(head, 0)
	return errors.Join(err, f.Close())
}
