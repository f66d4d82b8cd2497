package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"strings"
)

// superblock is what the first bytes of a disk say about its file system.
type superblock struct {
	fsType string // as mount(2) takes it; "" when none was recognized
	label  string
	uuid   string
}

// superblockBytes is how much of a device is read: ISO 9660 keeps its
// descriptor at 32 KiB, btrfs its superblock at 64 KiB.
const superblockBytes = 68 << 10

// readSuperblock recognizes the file system on a device. A device too short
// for a signature has none.
func readSuperblock(r io.ReaderAt) (superblock, error) {
	buf := make([]byte, superblockBytes)
	n, err := r.ReadAt(buf, 0)
	if err != nil && err != io.EOF {
		return superblock{}, err
	}
	return parseSuperblock(buf[:n]), nil
}

// parseSuperblock tries each signature at its place. Offsets are those of the
// kernel's fs/ext4/ext4.h, msdos_fs.h, squashfs_fs.h, iso_fs.h, xfs_format.h
// and btrfs_tree.h.
func parseSuperblock(b []byte) superblock {
	at := func(off, n int) []byte {
		if off+n > len(b) {
			return make([]byte, n)
		}
		return b[off : off+n]
	}
	switch {
	case binary.LittleEndian.Uint16(at(0x438, 2)) == 0xEF53:
		return superblock{extType(at(0x45C, 12)), text(at(0x478, 16)), uuid(at(0x468, 16))}
	case string(at(0, 4)) == "hsqs":
		return superblock{fsType: "squashfs"}
	case string(at(0, 4)) == "XFSB":
		return superblock{"xfs", text(at(0x6C, 12)), uuid(at(0x20, 16))}
	case string(at(0x10040, 8)) == "_BHRfS_M":
		return superblock{"btrfs", text(at(0x1012B, 256)), uuid(at(0x10020, 16))}
	case string(at(0x8001, 5)) == "CD001":
		return superblock{fsType: "iso9660", label: text(at(0x8028, 32))}
	case isFAT(at(0, 512)):
		return fatSuperblock(at(0, 512))
	}
	return superblock{}
}

// extType tells ext2, ext3 and ext4 apart by the feature words at 0x45C
// (compatible, incompatible, read-only compatible). ext4's driver serves all.
func extType(features []byte) string {
	const hasJournal, ext4Incompat, ext4ROCompat = 0x4, 0x2C0, 0x478
	compat := binary.LittleEndian.Uint32(features)
	incompat := binary.LittleEndian.Uint32(features[4:])
	roCompat := binary.LittleEndian.Uint32(features[8:])
	switch {
	case incompat&ext4Incompat != 0 || roCompat&ext4ROCompat != 0:
		return "ext4"
	case compat&hasJournal != 0:
		return "ext3"
	}
	return "ext2"
}

func isFAT(s []byte) bool {
	if s[510] != 0x55 || s[511] != 0xAA {
		return false
	}
	return bytes.HasPrefix(s[0x52:], []byte("FAT32")) || bytes.HasPrefix(s[0x36:], []byte("FAT1"))
}

func fatSuperblock(s []byte) superblock {
	serial, label := s[0x27:0x2B], s[0x2B:0x36]
	if bytes.HasPrefix(s[0x52:], []byte("FAT32")) {
		serial, label = s[0x43:0x47], s[0x47:0x52]
	}
	sb := superblock{fsType: "vfat", label: text(label)}
	if sb.label == "NO NAME" {
		sb.label = ""
	}
	n := binary.LittleEndian.Uint32(serial)
	sb.uuid = fmt.Sprintf("%04X-%04X", n>>16, n&0xFFFF)
	return sb
}

func text(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return strings.TrimSpace(string(b))
}

func uuid(b []byte) string {
	h := hex.EncodeToString(b)
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}
