package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ditto.vm/images/chain"
	"ditto.vm/images/index"
	"ditto.vm/memory"
	"ditto.vm/migration/live"
	"ditto.vm/migration/state"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
)

// apart is a destination that has no file of the source: its disk is at path.
type apart struct {
	*landing
	path   string
	bases  []string
	broken error // of Construct, when all is made
}

// Prepare implements [live.DestinationVM].
func (a *apart) Prepare(ctx context.Context, o live.Offer) (live.Arrival, error) {
	o.Bases = a.bases
	a.Configure = func(o live.Offer) (config.Config, error) {
		c, err := config.Parse(o.Config)
		if err == nil {
			c.Disks[0].Path = a.path
		}
		return c, err
	}
	arrival, err := a.landing.Prepare(ctx, o)
	if err != nil {
		return nil, err
	}
	return &apartArrival{arrival, a}, nil
}

// apartArrival is a VM that fails late.
type apartArrival struct {
	live.Arrival
	a *apart
}

// Construct implements [live.Arrival].
func (a *apartArrival) Construct(ctx context.Context, sections []state.Section, missing *memory.PageSet, source memory.PageSource) error {
	return errors.Join(a.Arrival.Construct(ctx, sections, missing, source), a.a.broken)
}

// qemuImg runs qemu-img, which says what images hold.
func qemuImg(t *testing.T, args ...string) {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("no qemu-img here: install qemu-utils")
	}
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		t.Errorf("qemu-img %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// onBase makes the rig's disk an overlay of what it was, and returns the base.
func onBase(t *testing.T, c *config.Config, format string) (base string) {
	base = c.Disks[0].Path
	if format == "qcow2" {
		base += ".qcow2"
		qemuImg(t, "convert", "-O", "qcow2", c.Disks[0].Path, base)
	}
	top := filepath.Join(quickDir(t), "top.qcow2")
	if err := chain.CreateOverlay(top, base, chain.Format(format), namesDisk); err != nil {
		t.Fatal(err)
	}
	c.Disks[0].Path, c.Disks[0].Format = top, chain.Qcow2
	return base
}

// TestMigrateDisks moves VMs to where none of their files is, while the guest
// writes its disk: what arrives is what left, to QEMU too, and of what the
// destination has nothing travels.
func TestMigrateDisks(t *testing.T) {
	for _, c := range []struct {
		name, base string // format of what is here of it, "" for nothing
		overlay    bool
		told       bool // of the base
		o          live.Options
	}{
		{name: "raw", o: live.Options{}},
		{name: "indexed", overlay: true, base: "raw", o: live.Options{Connections: 2}},
		{name: "told", overlay: true, base: "qcow2", told: true, o: live.Options{Connections: 1}},
		{name: "fetched", overlay: true, o: live.Options{Connections: 1, CopyLayers: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			source := ""
			r := newSaveRig(t, saveSpec, func(cfg *config.Config) {
				cfg.Disks[0].Format = chain.Raw
				if c.overlay {
					source = onBase(t, cfg, "raw")
				}
			})
			dir := quickDir(t)
			to := &apart{landing: newLanding(t), path: filepath.Join(dir, "disk")}
			if c.base != "" {
				base := filepath.Join(dir, "other name")
				qemuImg(t, "convert", "-O", c.base, source, base)
				if c.told {
					moved := filepath.Join(quickDir(t), "base")
					if err := os.Rename(base, moved); err != nil {
						t.Fatal(err)
					}
					to.bases = []string{moved}
				} else {
					indexImage(t, base)
				}
			}
			from := r.c.Disks[0].Path
			if source != "" { // the two sides are on one host: it must not be found there
				hidden := source + ".hidden"
				if err := os.Rename(source, hidden); err != nil {
					t.Fatal(err)
				}
				defer func() { _ = os.Rename(hidden, source) }()
			}
			r.readAll()
			stop := r.traffic(5)
			await(t, deadline(t), "blocks are overwritten", func() bool { return r.overwritten.Load() > 200 })
			o := c.o
			o.Disks, o.Verify = live.StorageCopied, true
			f := fly(t, r.m.MigrationSource(), to, o)
			stop()
			if f.err != nil || f.arrived != nil {
				t.Fatalf("source: %v; destination: %v", f.err, f.arrived)
			}
			t.Logf("%d bytes of disks, %d pages named of %+v", f.report.Sent.Disk, f.report.Pages.Named, f.report.Pages)
			if f.report.Sent.Disk == 0 || f.report.Pages.Named == 0 {
				t.Errorf("%+v", f.report)
			}
			vm := to.vm
			got := make([]byte, namesDisk)
			if err := vm.disks[0].image.ReadAtv([][]byte{got}, 0); err != nil || string(got) != string(r.content) {
				t.Errorf("the disk is not what it was, %v", err)
			}
			(&saveRig{t: t, m: vm, c: vm.cfg, content: r.content, dir: r.dir}).runs()
			if err := vm.Close(); err != nil {
				t.Error(err)
			}
			if source != "" {
				_ = os.Rename(source+".hidden", source)
			}
			if err := r.m.Close(); err != nil {
				t.Error(err)
			}
			qemuImg(t, "compare", from, to.path)
			if c.overlay {
				qemuImg(t, "check", to.path)
			}
			if parts, _ := filepath.Glob(filepath.Join(dir, ".*.part")); len(parts) > 0 {
				t.Errorf("left behind: %v", parts)
			}
		})
	}
}

// indexImage makes the index beside an image.
func indexImage(t *testing.T, path string) {
	t.Helper()
	c, err := chain.Open(path, chain.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := index.Build(t.Context(), c.Layers()[0], index.Beside(path), index.Options{}); err != nil {
		t.Fatal(err)
	}
}

// TestMigrateDisksRefused: what cannot be copied, or is not shared, leaves the VM
// where it is and no file where it was to go.
func TestMigrateDisksRefused(t *testing.T) {
	for _, c := range []struct {
		name, want string
		spoil      func(to *apart, o *live.Options)
	}{
		{"not shared", "--disks copy", func(_ *apart, o *live.Options) { o.Disks = live.StorageProven }},
		{"a copy of the file", "is not the file", func(to *apart, o *live.Options) {
			o.Disks = live.StorageProven
			if err := chain.Create(to.path, chain.Qcow2, namesDisk); err != nil {
				t.Fatal(err)
			}
		}},
		{"no base", "--copy-layers", func(*apart, *live.Options) {}},
		{"in the way", "is in the way", func(to *apart, o *live.Options) {
			o.CopyLayers = true
			if err := os.WriteFile(to.path, []byte("mine"), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"it fails at the end", "broken", func(to *apart, o *live.Options) {
			o.CopyLayers = true
			to.before = func(step string) error {
				if step == "construct" {
					return fmt.Errorf("broken")
				}
				return nil
			}
		}},
		{"it fails after the end", "broken", func(to *apart, o *live.Options) {
			o.CopyLayers = true
			to.broken = fmt.Errorf("broken")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			base := ""
			r := newSaveRig(t, saveSpec, func(cfg *config.Config) { base = onBase(t, cfg, "raw") })
			if err := os.Rename(base, base+".hidden"); err != nil {
				t.Fatal(err)
			}
			dir := quickDir(t)
			to, o := &apart{landing: newLanding(t), path: filepath.Join(dir, "disk")}, live.Options{Disks: live.StorageCopied}
			c.spoil(to, &o)
			before, _ := os.ReadDir(dir)
			f := fly(t, r.m.MigrationSource(), to, o)
			if f.err == nil || !strings.Contains(f.err.Error(), c.want) {
				t.Errorf("source: %v; destination: %v", f.err, f.arrived)
			}
			after, _ := os.ReadDir(dir)
			if len(after) != len(before) {
				t.Errorf("left behind: %v, and before there was %v", after, before)
			}
			if s := r.m.Info().State; s != api.Running {
				t.Errorf("the VM is %s", s)
			}
			if r.m.disks[0].writes.noted.Load() != nil {
				t.Error("writes are noted for nobody")
			}
			r.finish()
		})
	}
}
