package vmm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/internal/labtest"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/savehost"
)

// TestSaveFails: whatever the host cannot do, the VM goes on, with its disk as
// it was.
func TestSaveFails(t *testing.T) {
	for _, tc := range []struct {
		o      SaveOptions
		qcow2  bool
		direct bool
	}{
		{o: SaveOptions{Compression: snapshot.Zstd}},
		{o: SaveOptions{Parent: "parent"}, qcow2: true},
		{o: SaveOptions{Stop: true}, qcow2: true},
		{o: SaveOptions{Paused: true}, direct: true},
	} {
		t.Run(fmt.Sprintf("%+v", tc), func(t *testing.T) {
			r := newSaveRig(t, saveSpec, func(c *config.Config) {
				if tc.direct { // which memory cannot
					image := filepath.Join(t.TempDir(), "disk.img")
					content, err := os.ReadFile(c.Disks[0].Path)
					if err := errors.Join(err, os.WriteFile(image, content, 0o600)); err != nil {
						t.Fatal(err)
					}
					c.Disks[0].Path, c.Disks[0].Cache = image, disk.CacheNone
				}
				if tc.qcow2 {
					path := filepath.Join(quickDir(t), "top.qcow2")
					if err := chain.CreateOverlay(path, c.Disks[0].Path, chain.Raw, namesDisk); err != nil {
						t.Fatal(err)
					}
					c.Disks[0].Path = path
				}
			})
			r.readAll()
			o := tc.o
			if o.Parent != "" {
				r.save(o.Parent, SaveOptions{})
				r.watch.takeDump(t)
				o.Parent, o.ParentPath = filepath.Join(r.dir, o.Parent), "../"+o.Parent
			}
			images, files, snapshots := r.images(), listDir(t, filepath.Dir(r.c.Disks[0].Path)), listDir(t, r.dir)
			var asked []string
			for n := 0; ; n++ {
				asked = asked[:0]
				host := &hookHost{SaveHost: r.local("snap", tc.o.Parent)}
				host.hook = func(what string) error {
					asked = append(asked, what)
					if len(asked) == n+1 {
						if strings.HasPrefix(what, "create pagemap") && !tc.o.Stop {
							r.write(60, 70, 9) // goes into the overlay
						}
						return errHost
					}
					return nil
				}
				_, err := r.m.Save(deadline(t), host, o)
				if err == nil {
					break
				}
				if !errors.Is(err, errHost) || errors.Is(err, context.Canceled) {
					t.Fatalf("%s: %v", asked[n], err)
				}
				r.checkUndone(images, files, snapshots)
				r.watch.dump, r.watch.n = nil, 0
				r.write(50+n, 30+n, 5)
				r.read(20+n, 90+n, 5)
			}
			want := []string{"overlay", "create pages", "create pagemap", "create sections/machine", "create manifest.json", "commit"}
			if o.Parent != "" {
				want = append([]string{"open manifest.json", "open pagemap", "open pages"}, want...)
			}
			for _, what := range want {
				if !slices.Contains(asked, what) {
					t.Errorf("the host was never asked to %s: %v", what, asked)
				}
			}
			s := r.open("snap")
			r.check(s, r.watch.takeDump(t))
			got := make([]byte, namesDisk)
			if err := r.m.disks[0].image.ReadAtv([][]byte{got}, 0); err != nil || !bytes.Equal(got, r.content) {
				t.Errorf("the disk lost what was written, %v", err)
			}
		})
	}
}

// TestSaveDiskFull: a disk that is full in the middle of a save is said to be so,
// the machine goes on with its disk, and there is room again.
func TestSaveDiskFull(t *testing.T) {
	mount := t.TempDir()
	if err := unix.Mount("none", mount, "tmpfs", 0, "size=8m"); err != nil {
		t.Skipf("mount a small file system: %v (try: run as root)", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, 0); err != nil {
			t.Error(err)
		}
	})
	for _, tc := range []SaveOptions{{}, {Paused: true}, {Stop: true}, {Compression: snapshot.Zstd}} {
		t.Run(fmt.Sprintf("%+v", tc), func(t *testing.T) {
			r := newSaveRig(t, "memwriter:size=16M,words=512,order=random,seed=3", nil)
			r.readAll()
			runUntil(t, r.m, 20000)
			images, files := r.images(), listDir(t, filepath.Dir(r.c.Disks[0].Path))
			host, err := savehost.NewLocal(filepath.Join(mount, "snap"), savehost.Options{})
			if err != nil {
				t.Fatal(err)
			}
			// Some of it fits.
			if _, err := r.m.Save(deadline(t), host, tc); !errors.Is(err, snapshot.ErrNoSpace) || !strings.Contains(err.Error(), mount) {
				t.Errorf("%v", err)
			}
			r.checkUndone(images, files, nil)
			if left := listDir(t, mount); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			r.watch.dump, r.watch.n = nil, 0
			r.write(9, 20, 3)
			r.save("elsewhere", SaveOptions{})
			r.check(r.open("elsewhere"), r.watch.takeDump(t))
			r.finish()
		})
	}
}

// TestSaveInDoubt: a snapshot that may be complete keeps what it needs.
func TestSaveInDoubt(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	r.readAll()
	host := &hookHost{SaveHost: r.local("snap", "")}
	host.hook = func(what string) error {
		if what != "commit" {
			return nil
		}
		return errors.Join(host.SaveHost.Commit(), savehost.ErrInDoubt)
	}
	if _, err := r.m.Save(deadline(t), host, SaveOptions{}); !errors.Is(err, savehost.ErrInDoubt) {
		t.Fatal(err)
	}
	r.checkRuns()
	r.write(9, 20, 3)
	if got := r.images(); len(got) != 2 {
		t.Errorf("the disk is %v", got)
	}
	s := r.open("snap")
	r.check(s, r.watch.takeDump(t))
	if err := s.CheckLayers(t.Context()); err != nil {
		t.Error(err)
	}
	r.finish()
}

// TestSaveCanceled: a save that is canceled at any time leaves nothing.
func TestSaveCanceled(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	r.readAll()
	images, files := r.images(), listDir(t, filepath.Dir(r.c.Disks[0].Path))
	stop := r.traffic(1)
	canceled := 0
	rng := rand.New(rand.NewPCG(5, 5))
	for i := range labtest.Count(20, 300) {
		ctx, cancel := context.WithCancel(deadline(t))
		var timer *time.Timer
		o := SaveOptions{Compression: snapshot.Zstd, Stop: i%5 == 4}
		at := []SavePhase{SavePrepare, SaveMemory, SavePause, SaveCommit}[i%4]
		var once sync.Once
		o.Progress = func(p SaveProgress) {
			if p.Phase == at {
				once.Do(func() { timer = time.AfterFunc(time.Duration(rng.IntN(40))*time.Millisecond, cancel) })
			}
		}
		_, err := r.m.Save(ctx, r.local("snap", ""), o)
		if timer != nil {
			timer.Stop()
		}
		cancel()
		r.watch.dump, r.watch.n = nil, 0
		if err == nil {
			// It was too fast.
			if o.Stop {
				stop = func() {}
				break
			}
			if err := os.RemoveAll(filepath.Join(r.dir, "snap")); err != nil {
				t.Fatal(err)
			}
			images, files = r.images(), listDir(t, filepath.Dir(r.c.Disks[0].Path))
			continue
		}
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		canceled++
		r.checkUndone(images, files, nil)
	}
	if canceled == 0 {
		t.Error("no save was canceled")
	}
	stop()
}

// TestSaveBusy: two saves at once, and what may not happen during one.
func TestSaveBusy(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	host := &hookHost{SaveHost: r.local("one", "")}
	host.hook = func(what string) error {
		if what != "overlay" {
			return nil
		}
		if _, err := r.m.Save(t.Context(), r.local("two", ""), SaveOptions{}); !errors.Is(err, snapshot.ErrBusy) {
			t.Errorf("a second save: %v", err)
		}
		if err := r.m.ResizeDisk(0, namesDisk/2); !errors.Is(err, api.ErrWrongState) {
			t.Errorf("a disk is resized while it is saved: %v", err)
		}
		return nil
	}
	if _, err := r.m.Save(deadline(t), host, SaveOptions{}); err != nil {
		t.Fatal(err)
	}
	r.check(r.open("one"), r.watch.takeDump(t))
	r.checkRuns()
	if files := listDir(t, r.dir); len(files) != 1 {
		t.Errorf("left: %v", files)
	}
	r.finish()
	if _, err := r.m.Save(t.Context(), r.local("three", ""), SaveOptions{}); !errors.Is(err, api.ErrWrongState) {
		t.Errorf("a guest that has ended is saved: %v", err)
	}
	if files := listDir(t, r.dir); len(files) != 1 {
		t.Errorf("left: %v", files)
	}
}

// TestSaveMeetsTheEnd: a guest that ends while its memory is stored is not
// saved; one that ends after it was captured is, and so are those that are closed
// at any time.
func TestSaveMeetsTheEnd(t *testing.T) {
	for _, phase := range []SavePhase{SavePrepare, SaveMemory, SavePause, SaveCommit} {
		for _, closed := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s,closed=%t", phase, closed), func(t *testing.T) {
				r := newSaveRig(t, saveSpec, nil)
				var once sync.Once
				var end sync.WaitGroup
				_, err := r.m.Save(deadline(t), r.local("snap", ""), SaveOptions{Progress: func(p SaveProgress) {
					if p.Phase != phase {
						return
					}
					once.Do(func() {
						r.m.Kill()
						<-r.m.ended
						if closed {
							end.Go(func() {
								if err := r.m.Close(); err != nil {
									t.Error(err)
								}
							})
							r.awaitClosed()
						}
					})
				}})
				end.Wait()
				_, statErr := os.Stat(filepath.Join(r.dir, "snap"))
				if (err == nil) != (statErr == nil) || (phase != SaveCommit || closed) == (err == nil) {
					t.Errorf("saved: %v; there: %v", err, statErr)
				}
				files := listDir(t, filepath.Dir(r.c.Disks[0].Path))
				if err != nil && !slices.Equal(files, []string{"disk.img -rw-------"}) {
					t.Errorf("beside the disk is %v", files)
				}
			})
		}
	}
}
