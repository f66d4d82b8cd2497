package vmm

import (
	"bytes"
	"context"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"

	"ditto.vm/images/index"
	"ditto.vm/images/layer"
	"ditto.vm/internal/labtest"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/vmm/config"
)

// tree is a disk image with an ext4 file system that holds files of random
// bytes, so that each of their blocks is there only once.
type tree struct {
	image  string
	bytes  []byte            // of the image
	blocks map[uint64]uint64 // block of the image, by a hash of a file's page
	seed   maphash.Seed
}

// newTree makes an image with files of so many MiB in all.
func newTree(t *testing.T, mib int) *tree {
	t.Helper()
	dir := t.TempDir()
	files := filepath.Join(dir, "files")
	if err := os.Mkdir(files, 0o755); err != nil {
		t.Fatal(err)
	}
	tr := &tree{image: filepath.Join(dir, "tree.img"), blocks: map[uint64]uint64{}, seed: maphash.MakeSeed()}
	const fileMiB = 4
	random := rand.NewChaCha8([32]byte{1})
	pages := map[uint64]bool{}
	for i := range mib / fileMiB {
		content := make([]byte, fileMiB<<20)
		_, _ = random.Read(content)
		if err := os.WriteFile(filepath.Join(files, fmt.Sprintf("f%03d", i)), content, 0o644); err != nil {
			t.Fatal(err)
		}
		for off := 0; off < len(content); off += names.BlockSize {
			pages[tr.hash(content[off:][:names.BlockSize])] = true
		}
	}
	out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", files, tr.image, strconv.Itoa(mib+mib/8+16)+"M").CombinedOutput()
	if err != nil {
		t.Fatalf("mke2fs: %v: %s; try: apt-get install e2fsprogs", err, out)
	}
	if tr.bytes, err = os.ReadFile(tr.image); err != nil {
		t.Fatal(err)
	}
	for off := 0; off+names.BlockSize <= len(tr.bytes); off += names.BlockSize {
		if h := tr.hash(tr.bytes[off:][:names.BlockSize]); pages[h] {
			tr.blocks[h] = uint64(off) / names.BlockSize
		}
	}
	if len(tr.blocks) != mib<<20/names.BlockSize {
		t.Fatalf("%d blocks of the image hold the files, want %d", len(tr.blocks), mib<<20/names.BlockSize)
	}
	return tr
}

func (tr *tree) hash(page []byte) uint64 { return maphash.Bytes(tr.seed, page) }

// block returns block n of the image, nil when there is none.
func (tr *tree) block(n uint64) []byte {
	if n >= uint64(len(tr.bytes))/names.BlockSize {
		return nil
	}
	return tr.bytes[n*names.BlockSize:][:names.BlockSize]
}

// count walks the memory of the paused machine. It returns how many pages hold
// bytes of the tree, and how many of them have the name of their block. A proven
// name of the layer that is wrong fails the test.
func (tr *tree) count(t *testing.T, m *VM, l names.LayerID, at func(memory.GFN) names.Name) (holding, named, proven int) {
	t.Helper()
	for _, r := range m.mem.Regions() {
		for gpa := r.Start; gpa < r.End(); gpa += memory.PageSize {
			page, err := m.mem.View(gpa, memory.PageSize)
			if err != nil {
				t.Fatal(err)
			}
			n := at(gpa.GFN())
			of := n.Kind() == names.Block && n.Layer() == l
			if of && n.Proven() && !bytes.Equal(page, tr.block(n.Number())) {
				t.Errorf("page %s is not the block that it is proven to be: %s", gpa, n)
			}
			if of && n.Proven() {
				proven++
			}
			if layer.IsZero(page) {
				continue
			}
			block, ok := tr.blocks[tr.hash(page)]
			if !ok || !bytes.Equal(page, tr.block(block)) {
				continue
			}
			holding++
			if of && n.Number() == block {
				named++
			}
		}
	}
	return holding, named, proven
}

// layerOf returns the number of the layer that is the file at path.
func layerOf(t *testing.T, m *VM, path string) names.LayerID {
	t.Helper()
	for i, l := range m.naming.Table().Layers() {
		if l.Title == path {
			return names.LayerID(i)
		}
	}
	t.Fatalf("%s is no layer of the machine", path)
	return 0
}

// pausedAt boots c until its console shows READY, waits until the names are
// proven or a time is over, and pauses the machine.
func pausedAt(t *testing.T, c config.Config, proven uint64) *VM {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*linuxTimeout)
	defer cancel()
	out := newConsole()
	m := newVM(t, c, out)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := out.waitForAny(ctx, m.ended, "READY", "SCRIPT-ENDED"); err != nil || !strings.Contains(out.String(), "READY") {
		t.Fatalf("%v\n%s", err, out)
	}
	for end := time.Now().Add(90 * time.Second); m.naming.Stats().Proven < proven && time.Now().Before(end); {
		time.Sleep(100 * time.Millisecond)
	}
	if err := m.Pause(ctx); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := m.naming.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	return m
}

// share returns a as a share of b in per cent.
func share(a, b int) float64 { return 100 * float64(a) / float64(max(b, 1)) }

// TestLinuxNamesATree: of the pages that hold a tree which Linux has read, nearly
// all are named by the right block, and no proven name is wrong.
func TestLinuxNamesATree(t *testing.T) {
	requireLinux(t)
	mib := labtest.Count(64, 300)
	tr := newTree(t, mib)
	for _, readOnly := range []bool{true, false} {
		t.Run(fmt.Sprintf("readonly=%v", readOnly), func(t *testing.T) {
			c := linuxConfig(t, "6.12-cloud", "mkdir /mnt && mount -t ext4 -o ro /dev/vda /mnt && cat /mnt/f* > /dev/null && echo READY && sleep 1000\n", "virtio_blk", "ext4")
			c.Memory.Size = config.Bytes(mib+320) << 20
			c.Disks = []config.Disk{{Path: tr.image, ReadOnly: readOnly}}
			m := pausedAt(t, c, uint64(mib)<<20/memory.PageSize*97/100)
			disk := layerOf(t, m, tr.image)
			holding, named, proven := tr.count(t, m, disk, m.naming.Table().At)
			if holding < mib<<20/memory.PageSize*9/10 {
				t.Errorf("only %d pages hold the tree of %d MiB", holding, mib)
			}
			if share(named, holding) < 95 {
				t.Errorf("%d of %d pages are named (%.1f %%), %d names are proven: want 95 %%; %+v", named, holding, share(named, holding), proven, m.naming.Stats())
			}
			all, err := m.namePages(t.Context(), true, nil)
			if err != nil {
				t.Fatal(err)
			}
			_, passed, _ := tr.count(t, m, disk, all.At)
			if share(passed, holding) < 99 {
				t.Errorf("after a pass %d of %d pages are named", passed, holding)
			}
			if readOnly {
				labtest.Proof(t, "names-tree", "%d MiB read: %d of %d pages that hold it are named (%.2f %%), %d names proven, 0 wrong; %.2f %% after a pass",
					mib, named, holding, share(named, holding), proven, share(passed, holding))
			}
		})
	}
}

// TestLinuxNamesByIndex: bytes of a base image that the guest never reads reach
// memory with the initramfs, and are named through the image's index.
func TestLinuxNamesByIndex(t *testing.T) {
	requireLinux(t)
	const mib = 16
	tr := newTree(t, mib)
	file, err := layer.OpenFile(tr.image)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := index.Build(t.Context(), file, index.Beside(tr.image), index.Options{}); err != nil {
		t.Fatal(err)
	}
	c := linuxConfig(t, "6.12", "echo READY\nsleep 1000\n", virtioModules...)
	addToInitrd(t, c.Initrd, "base", tr.bytes)
	c.Memory.Size = 384 << 20
	c.Disks = []config.Disk{{Path: tr.image, ReadOnly: true}}
	m := pausedAt(t, c, 0)
	disk := layerOf(t, m, tr.image)
	_, recorded, _ := tr.count(t, m, disk, m.naming.Table().At)
	all, err := m.namePages(t.Context(), true, nil)
	if err != nil {
		t.Fatal(err)
	}
	holding, named, _ := tr.count(t, m, disk, all.At)
	if holding < mib<<20/memory.PageSize*9/10 || share(named, holding) < 95 {
		t.Errorf("%d of %d pages are named, %d of them as I/O went by", named, holding, recorded)
	}
	if _, kept, _ := tr.count(t, m, disk, m.naming.Table().At); share(kept, holding) < 95 {
		t.Errorf("the table keeps %d of %d names that the pass found", kept, named)
	}
	labtest.Proof(t, "names-index", "a base image of %d MiB that was not read: %d of %d pages that hold it are named (%.2f %%), %d of them by I/O",
		mib, named, holding, share(named, holding), recorded)
}

// addToInitrd appends an archive with one file to an initramfs.
func addToInitrd(t *testing.T, path, name string, content []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := cpio.Newc.Writer(f)
	if err := cpio.WriteRecords(w, []cpio.Record{cpio.StaticFile(name, string(content), 0o644)}); err != nil {
		t.Fatal(err)
	}
	if err := cpio.WriteTrailer(w); err != nil {
		t.Fatal(err)
	}
}
