package layer

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Stamp is what a file system says of a file without reading it. While it stays
// the same, nobody has written the file in the ordinary way. A write through a
// mapping, a changed clock or a block device can evade it, so whoever depends on
// a layer also checks samples of its content.
type Stamp struct {
	Size   int64  // bytes
	Mtime  int64  // last write, nanoseconds since 1970
	Ctime  int64  // last change of content or attributes, likewise
	Device uint64 // the file system
	Inode  uint64
}

// stampOf reads the stamp of an open file of size bytes.
func stampOf(fd int, size int64) (Stamp, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return Stamp{}, fmt.Errorf("stat: %w", err)
	}
	return Stamp{Size: size, Mtime: st.Mtim.Nano(), Ctime: st.Ctim.Nano(), Device: st.Dev, Inode: st.Ino}, nil
}

// Difference names the first thing in which s and t differ, "" for none.
func (s Stamp) Difference(t Stamp) string {
	switch {
	case s.Size != t.Size:
		return fmt.Sprintf("its size was %d and is %d bytes", s.Size, t.Size)
	case s.Device != t.Device || s.Inode != t.Inode:
		return "it is another file"
	case s.Mtime != t.Mtime:
		return "it was written"
	case s.Ctime != t.Ctime:
		return "it was written or its attributes were changed"
	}
	return ""
}
