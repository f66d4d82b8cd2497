package mkdisk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNoTool says that a program this package runs is not installed.
var ErrNoTool = errors.New("program not found")

// ErrTooSmall says that the content does not fit the size asked for.
var ErrTooSmall = errors.New("the folder does not fit")

// findTool finds a program in PATH and where administrators' programs lie,
// which is not in everyone's PATH.
func findTool(name, pkg string) (string, error) {
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin") {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s: %w: install it with apt-get install %s", name, ErrNoTool, pkg)
}

// content is what a folder takes in a file system of 4 KiB blocks.
type content struct {
	blocks int64 // of files and folders
	inodes int64
}

// measure adds up a folder as mke2fs -d will copy it: hard links once, holes
// as holes, fast symbolic links without a block.
func measure(ctx context.Context, folder string) (content, error) {
	var c content
	type inode struct{ dev, ino uint64 }
	seen := map[inode]bool{}
	err := filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return &fs.PathError{Op: "lstat", Path: path, Err: err}
		}
		if id := (inode{st.Dev, st.Ino}); st.Nlink > 1 && !d.IsDir() {
			if seen[id] {
				return nil
			}
			seen[id] = true
		}
		c.inodes++
		c.blocks += fileBlocks(&st)
		return nil
	})
	return c, err
}

// fastSymlinkBytes is the longest target that ext4 keeps in the inode.
const fastSymlinkBytes = 59

func fileBlocks(st *unix.Stat_t) int64 {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		// A folder of the host may be stored denser than ext4's.
		return 1 + roundUp(st.Size, blockBytes)/blockBytes
	case unix.S_IFLNK:
		if st.Size <= fastSymlinkBytes {
			return 0
		}
		return 1
	case unix.S_IFREG:
		full := roundUp(st.Size, blockBytes) / blockBytes
		// One block of extent index for each 340 extents a fragmented file may
		// need is far below one in a thousand.
		return full + full/1000
	}
	return 0
}

const (
	inodeBytes     = 256
	bytesPerInode  = 16384
	minSlackBytes  = 64 << 20
	sizeRetries    = 3
	reservedInodes = 11
)

// computeSize is the size of a file system for c with slack bytes free.
func computeSize(c content, slack int64) int64 {
	data := c.blocks * blockBytes
	if slack == 0 {
		slack = max(data/5, minSlackBytes)
	}
	body := data + slack
	inodes := max(c.inodes+reservedInodes, body/bytesPerInode)
	// Bitmaps, group descriptors and backup superblocks: below 1 %.
	size := body + inodes*inodeBytes + body/100 + (1 << 20)
	size += journalBytes(size)
	return roundUp(size, sizeAlign)
}

// journalBytes is what mke2fs sets aside for a journal (ext2fs_default_journal_size).
func journalBytes(size int64) int64 {
	switch blocks := size / blockBytes; {
	case blocks < 2048:
		return 0
	case blocks < 32768:
		return 1024 * blockBytes
	case blocks < 256*1024:
		return 4096 * blockBytes
	case blocks < 512*1024:
		return 8192 * blockBytes
	case blocks < 4096*1024:
		return 16384 * blockBytes
	case blocks < 8192*1024:
		return 32768 * blockBytes
	case blocks < 16384*1024:
		return 65536 * blockBytes
	}
	return 262144 * blockBytes
}

// fillExt4 makes the file system in the file at path. A computed size that
// proves too small is raised and tried again.
func (o *Options) fillExt4(ctx context.Context, path string) error {
	tool, err := findTool("mke2fs", "e2fsprogs")
	if err != nil {
		return err
	}
	var c content
	if o.Folder != "" {
		if c, err = measure(ctx, o.Folder); err != nil {
			return err
		}
	}
	size := roundUp(max(o.SizeBytes, minExt4Bytes), sizeAlign)
	if o.SizeBytes == 0 {
		size = computeSize(c, o.SlackBytes)
	}
	for try := 0; ; try++ {
		err := o.mke2fs(ctx, tool, path, size, c)
		if !errors.Is(err, ErrTooSmall) || try == sizeRetries || o.SizeBytes != 0 {
			return err
		}
		size = roundUp(size+size/4, sizeAlign)
	}
}

func (o *Options) mke2fs(ctx context.Context, tool, path string, size int64, c content) error {
	// From nothing: what a failed try wrote must not stay in the holes.
	if err := errors.Join(os.Truncate(path, 0), os.Truncate(path, size)); err != nil {
		return err
	}
	args := []string{
		"-q", "-F", "-t", "ext4", "-b", strconv.Itoa(blockBytes), "-m", "0", "-I", strconv.Itoa(inodeBytes),
		"-i", strconv.Itoa(bytesPerInode),
		// Finished inode tables: else the guest's kernel writes them later.
		"-E", "root_owner=0:0,lazy_itable_init=0",
	}
	if need := c.inodes + reservedInodes; need > size/bytesPerInode {
		args = append(args, "-N", strconv.FormatInt(need+need/10+64, 10))
	}
	if o.Label != "" {
		args = append(args, "-L", o.Label)
	}
	if o.UUID != "" {
		args = append(args, "-U", o.UUID)
	}
	if o.Folder != "" {
		args = append(args, "-d", o.Folder)
	}
	cmd := exec.CommandContext(ctx, tool, append(args, path)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "MKE2FS_SKIP_PROGRESS=1")
	cmd.WaitDelay = toolTimeLimit
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return mke2fsError(err, out.String(), size)
}

// mke2fsError turns what mke2fs said into one error.
func mke2fsError(err error, out string, size int64) error {
	if err == nil {
		return nil
	}
	out = strings.TrimSpace(out)
	for _, s := range []string{
		"Could not allocate block", "No free space", "Could not allocate inode",
		"too small", "too big", "Not enough space to build", "Could not expand directory",
	} {
		if strings.Contains(out, s) {
			return fmt.Errorf("%w in %d MiB: give a larger size, or none: %s", ErrTooSmall, size>>20, lastLine(out))
		}
	}
	return fmt.Errorf("mke2fs: %w: %s", err, lastLine(out))
}

func lastLine(s string) string { return s[strings.LastIndexByte(s, '\n')+1:] }
