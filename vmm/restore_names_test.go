package vmm

import (
	"bytes"
	"fmt"
	"maps"
	"path/filepath"
	"testing"

	"ditto.vm/images/layer"
	"ditto.vm/memory"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/config"
)

// TestRestoreNames: pages that equal blocks of a disk are mapped from it, and a
// snapshot of the restored machine knows that again.
func TestRestoreNames(t *testing.T) {
	c, content := namesConfig(t)
	c.Disks[0].ReadOnly = true
	m := newVM(t, c, newConsole())
	ctx := deadline(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	readDisk(t, attach(t, m, "blk0"))
	if err := m.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	first := filepath.Join(quickDir(t), "first")
	snapshotOf(t, m, first, snapshot.None)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m = restoreFrom(t, first, SnapshotOptions{Config: c})
	if s := m.restored.stats(); s.MappedBytes < namesDisk {
		t.Errorf("%+v: the disk's blocks are not mapped", s)
	}
	got, err := m.mem.View(namesBuffers, namesDisk)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("what was read from the disk is another, %v", err)
	}
	if !m.restored.teach(ctx) {
		t.Fatal(ctx.Err())
	}
	if named := m.naming.Stats().Named; named < namesDisk/memory.PageSize {
		t.Errorf("%d pages are named", named)
	}
	second := filepath.Join(filepath.Dir(first), "second")
	snapshotOf(t, m, second, snapshot.None)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	var holds []snapshot.Holds
	for _, dir := range []string{first, second} {
		s, err := snapshot.Open(dir, snapshot.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		holds = append(holds, s.Manifest().Holds)
		// Were the disk the kernel, nothing would be mapped from it.
		for path, copied := range map[string]bool{c.Disks[0].Path: true, dir: false} {
			other := restored{vm: &VM{cfg: config.Config{Kernel: path}}}
			if got := other.bootFiles()(s, 0); got != copied {
				t.Errorf("a disk with the kernel %s: copied %v", path, got)
			}
		}
		s.Close()
	}
	// The page of the generation ID may differ.
	if holds[0] != holds[1] || holds[0].Blocks < namesDisk {
		t.Errorf("the first holds %+v, the second %+v", holds[0], holds[1])
	}
}

// restoreLazily makes a machine of a snapshot, with overlays on its disks.
func (r *saveRig) restoreLazily(name string) *saveRig {
	r.t.Helper()
	c := restoredConfig(r.t, filepath.Join(r.dir, name))
	m := restoreFrom(r.t, filepath.Join(r.dir, name), SnapshotOptions{Config: c, RestoreOptions: RestoreOptions{NewGenerationID: true}})
	return &saveRig{t: r.t, m: m, c: c, content: r.content, dir: r.dir}
}

// TestRestoreSaves: a machine that was restored and runs is saved and restored
// again and again, with most of its memory where it was; none of its pages is ever
// wrong, and a save of one that did nothing stores next to nothing.
func TestRestoreSaves(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	r.readAll()
	r.save("snap0", SaveOptions{})
	r.finish()
	const rounds = 4
	last := ""
	for i := range rounds {
		last = fmt.Sprintf("snap%d", i)
		r = r.restoreLazily(last)
		if err := r.m.Resume(deadline(t)); err != nil {
			t.Fatal(err)
		}
		runUntil(t, r.m, 500)
		o := SaveOptions{Compression: []snapshot.Compression{snapshot.None, snapshot.Zstd}[i%2]}
		if i%2 == 1 {
			o.Parent = last
		}
		report := r.save(fmt.Sprintf("snap%d", i+1), o)
		if held := report.Holds.Blocks + report.Holds.Parent; held < namesDisk {
			t.Errorf("round %d: %+v: the disk's blocks are not known any more", i, report.Holds)
		}
		r.finish()
		if err := r.m.Close(); err != nil {
			t.Fatal(err)
		}
	}

	r = r.restoreLazily("snap0")
	report, err := r.m.Save(deadline(t), r.local("idle", "snap0"), SaveOptions{Parent: filepath.Join(r.dir, "snap0"), ParentPath: "../snap0"})
	if err != nil {
		t.Fatal(err)
	}
	if h := report.Holds; h.Unique > 16*memory.PageSize {
		t.Errorf("a machine that did nothing holds %+v", h)
	}
	idle := r.open("idle")
	r.check(idle, r.m.mem)
	// Its layers are the ones that they were.
	if was, now := usedLayers(r.open("snap0")), usedLayers(idle); len(was) == 0 || !maps.Equal(was, now) {
		t.Errorf("layers by identity were %v and are %v", was, now)
	}
}

// usedLayers are the layers that pages of a snapshot are named by.
func usedLayers(s *snapshot.Snapshot) map[layer.ID]string {
	used := map[layer.ID]string{}
	for _, run := range s.Runs() {
		if run.Kind == snapshot.Block {
			l := s.Manifest().Layers[run.Layer]
			used[l.ID] = l.Path
		}
	}
	return used
}
