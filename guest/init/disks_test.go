package main

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestReadSuperblockOfRealFileSystems(t *testing.T) {
	for _, tc := range []struct {
		tool string
		args []string
		want superblock
	}{
		{"mke2fs", []string{"-q", "-F", "-t", "ext4", "-L", "data", "-U", "7d3c2a4e-0f4b-4a8e-9a61-0b5a4c3d2e1f"}, superblock{"ext4", "data", "7d3c2a4e-0f4b-4a8e-9a61-0b5a4c3d2e1f"}},
		{"mke2fs", []string{"-q", "-F", "-t", "ext3", "-L", "old", "-U", "7d3c2a4e-0f4b-4a8e-9a61-0b5a4c3d2e1f"}, superblock{"ext3", "old", "7d3c2a4e-0f4b-4a8e-9a61-0b5a4c3d2e1f"}},
		{"mke2fs", []string{"-q", "-F", "-t", "ext2", "-U", "7d3c2a4e-0f4b-4a8e-9a61-0b5a4c3d2e1f"}, superblock{"ext2", "", "7d3c2a4e-0f4b-4a8e-9a61-0b5a4c3d2e1f"}},
		{"mkfs.vfat", []string{"-n", "ESP", "-i", "12345678"}, superblock{"vfat", "ESP", "1234-5678"}},
		{"mkfs.vfat", []string{"-F", "32", "-n", "BIG", "-i", "9ABCDEF0"}, superblock{"vfat", "BIG", "9ABC-DEF0"}},
	} {
		t.Run(tc.tool+tc.want.fsType+tc.want.label, func(t *testing.T) {
			tool, err := exec.LookPath(tc.tool)
			if err != nil {
				if tool, err = exec.LookPath(filepath.Join("/usr/sbin", tc.tool)); err != nil {
					t.Skipf("%s not found: apt-get install e2fsprogs dosfstools", tc.tool)
				}
			}
			img := filepath.Join(t.TempDir(), "img")
			if err := os.WriteFile(img, nil, 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(img, 48<<20); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(tool, append(tc.args, img)...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			f, err := os.Open(img)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			got, err := readSuperblock(f)
			if err != nil || got != tc.want {
				t.Errorf("got %+v, %v; want %+v", got, err, tc.want)
			}
		})
	}
}

func TestParseSuperblockSignatures(t *testing.T) {
	put := func(off int, data string) []byte {
		b := make([]byte, superblockBytes)
		copy(b[off:], data)
		return b
	}
	for _, tc := range []struct {
		b    []byte
		want string
	}{
		{nil, ""},
		{make([]byte, 100), ""},
		{put(0, "hsqs"), "squashfs"},
		{put(0, "XFSB"), "xfs"},
		{put(0x10040, "_BHRfS_M"), "btrfs"},
		{put(0x8001, "CD001"), "iso9660"},
		{put(510, "\x55\xaa"), ""}, // a partition table is no file system
		{put(0x438, "\x53\xef")[:0x439], ""},
	} {
		if got := parseSuperblock(tc.b); got.fsType != tc.want {
			t.Errorf("got %q, want %q", got.fsType, tc.want)
		}
	}
}

func FuzzSuperblock(f *testing.F) {
	ext := make([]byte, 0x500)
	binary.LittleEndian.PutUint16(ext[0x438:], 0xEF53)
	f.Add(ext)
	f.Add(append(bytes.Repeat([]byte("FAT32   "), 64)[:510], 0x55, 0xAA))
	f.Fuzz(func(t *testing.T, b []byte) {
		sb := parseSuperblock(b)
		if sb.fsType == "" && sb != (superblock{}) {
			t.Errorf("a label without a file system: %+v", sb)
		}
	})
}

func TestLookupDisk(t *testing.T) {
	disks := []disk{{"vda", superblock{"ext4", "data", "AB-CD"}}, {"vdb1", superblock{"vfat", "", ""}}}
	for source, want := range map[string]string{
		"/dev/vda": "vda", "vda": "vda", "LABEL=data": "vda", "UUID=ab-cd": "vda", "vdb1": "vdb1",
		"LABEL=": "", "UUID=": "", "vdb": "", "": "",
	} {
		if d, ok := lookupDisk(disks, source); d.name != want || ok != (want != "") {
			t.Errorf("%q: got %q, want %q", source, d.name, want)
		}
	}
}

func TestSafeLabel(t *testing.T) {
	for label, want := range map[string]bool{"data": true, "a-b_c.1": true, "": false, "..": false, "a/b": false, ".x": false, "a b": false, "é": false} {
		if safeLabel(label) != want {
			t.Errorf("%q: want %v", label, want)
		}
	}
}
