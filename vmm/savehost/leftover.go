package savehost

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// note stands beside a disk, in a hidden file, while the disk is frozen for a save
// that is not whole yet. A client that is killed leaves it. When the machine asks
// for that disk to be frozen again, it has undone the first save and writes the
// disk itself: then what the note tells of is of no use to anybody. If another machine
// asks, the first has ended, perhaps in the overlay, which may be all that there is
// of what its guest wrote last.
type note struct {
	// Machine that was saved, as in [Options].
	Machine string `json:"machine"`
	// Mode of the disk's file before it was frozen.
	Mode fs.FileMode `json:"mode"`
	// Overlay that was made on the disk, "" for none, and which file it is.
	Overlay string `json:"overlay,omitempty"`
	Device  uint64 `json:"device,omitempty"`
	Inode   uint64 `json:"inode,omitempty"`
}

// maxNote bounds the file of a note, in bytes.
const maxNote = 8 << 10

func noteOf(dir, below string) string {
	return filepath.Join(dir, "."+filepath.Base(below)+".freezing")
}

// write makes or changes the note. That it cannot be made must not fail a save:
// without it more is left by a client that is killed.
func (n note) write(path string) {
	b, err := json.Marshal(n)
	if err != nil {
		return
	}
	_ = os.Remove(path) // of this save, or whatever it is
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return
	}
	_, _ = f.Write(b)
	_ = f.Close()
}

// identify adds which file the overlay is.
func (n note) identify(overlay string) (note, error) {
	var st unix.Stat_t
	if err := unix.Lstat(overlay, &st); err != nil {
		return n, err
	}
	n.Overlay, n.Device, n.Inode = overlay, st.Dev, st.Ino
	return n, nil
}

// redeem undoes what the note at path tells of, if there is one that is machine's:
// below is as it was before it was frozen, and the overlay is gone.
func redeem(path, below, machine string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	n, err := readNote(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if n.Machine != machine || n.Overlay != "" && filepath.Dir(n.Overlay) != filepath.Dir(path) {
		n = note{}
	}
	return errors.Join(n.undo(below), os.Remove(path))
}

// readNote reads a note. One of somebody else, and one that was being written,
// says nothing.
func readNote(f *os.File) (n note, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || int(st.Uid) != os.Geteuid() {
		return note{}, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxNote))
	if err != nil || json.Unmarshal(b, &n) != nil {
		return note{}, err
	}
	return n, nil
}

func (n note) undo(below string) error {
	if n.Overlay != "" {
		now, err := note{}.identify(n.Overlay)
		if err == nil && now.Device == n.Device && now.Inode == n.Inode {
			err = os.Remove(n.Overlay)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	info, err := os.Stat(below)
	if err != nil || !info.Mode().IsRegular() || info.Mode()&0o222 != 0 || n.Mode.Perm()&^0o222 != info.Mode().Perm() {
		return err // somebody has seen to it
	}
	return os.Chmod(below, n.Mode.Perm())
}
