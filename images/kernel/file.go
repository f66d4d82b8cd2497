package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Offsets in a bzImage (Linux Documentation/arch/x86/boot.rst).
const (
	offSetupMagic    = 0x202 // "HdrS"
	offKernelVersion = 0x20e // u16: offset of the version string, less 0x200
	setupHeaderEnd   = 0x268
	maxVersionLen    = 128 // of the version string; longer ones are cut
)

// fromFile describes the kernel in a file. Whether the image can be booted is
// for the boot loader to say; here it must only be a file.
func fromFile(path string) (Kernel, error) {
	fi, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Kernel{}, fmt.Errorf("kernel: %w: check the path, or take a name that 'ditto image ls' shows", err)
	}
	if err != nil {
		return Kernel{}, fmt.Errorf("kernel: %w", err)
	}
	if !fi.Mode().IsRegular() {
		return Kernel{}, fmt.Errorf("kernel: %s is not a regular file", path)
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return Kernel{}, fmt.Errorf("kernel: %w", err)
	}
	k := Kernel{Image: abs, Version: fileVersion(abs)}
	if k.Version == "" {
		return k, nil
	}
	_, k.Flavour = splitRelease(k.Version)
	dir := filepath.Dir(abs)
	k.Config = existing(filepath.Join(dir, "config-"+k.Version))
	k.ModulesDir = existing(
		filepath.Join(dir, "lib", "modules", k.Version),
		filepath.Join(dir, "..", "lib", "modules", k.Version),
		filepath.Join(dir, "..", "usr", "lib", "modules", k.Version),
		filepath.Join("/lib/modules", k.Version))
	return k, nil
}

// fileVersion tells the release of an image: a bzImage says it in its setup
// header, other images by their name, if at all.
func fileVersion(path string) string {
	if f, err := os.Open(path); err == nil {
		defer func() { _ = f.Close() }()
		if v := imageVersion(f); v != "" {
			return v
		}
	}
	for _, prefix := range []string{"vmlinuz-", "vmlinux-", "bzImage-"} {
		if v, ok := strings.CutPrefix(filepath.Base(path), prefix); ok {
			return v
		}
	}
	return ""
}

// imageVersion reads the release from a bzImage, or returns "" if r is none.
func imageVersion(r io.ReaderAt) string {
	hdr := make([]byte, setupHeaderEnd)
	if _, err := r.ReadAt(hdr, 0); err != nil {
		return ""
	}
	off := binary.LittleEndian.Uint16(hdr[offKernelVersion:])
	if !bytes.Equal(hdr[offSetupMagic:offSetupMagic+4], []byte("HdrS")) || off == 0 {
		return ""
	}
	text := make([]byte, maxVersionLen)
	n, err := r.ReadAt(text, int64(off)+0x200)
	if err != nil && !errors.Is(err, io.EOF) {
		return ""
	}
	text, _, _ = bytes.Cut(text[:n], []byte{0})
	version, _, _ := strings.Cut(string(text), " ")
	if strings.ContainsAny(version, "/\n") || strings.HasPrefix(version, ".") {
		return "" // it becomes part of a path
	}
	return version
}
