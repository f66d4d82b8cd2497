package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/lab/wire"
)

// moduleGroup is a list of open modules, in the order in which to load them.
type moduleGroup []*os.File

// openModules opens the modules of the initramfs and removes their names: the
// root is moved while they are being loaded. A file is called
// <group>-<number>-<module>.ko.
func openModules() ([]moduleGroup, error) {
	entries, err := os.ReadDir(wire.ModulesPath)
	if err != nil {
		return nil, err
	}
	var groups []moduleGroup
	last := ""
	for _, e := range entries {
		path := filepath.Join(wire.ModulesPath, e.Name())
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
		group, _, _ := strings.Cut(e.Name(), "-")
		if group != last {
			groups = append(groups, nil)
			last = group
		}
		groups[len(groups)-1] = append(groups[len(groups)-1], f)
	}
	return groups, nil
}

// load loads the modules and closes them.
func (g moduleGroup) load() error {
	for _, f := range g {
		err := unix.FinitModule(int(f.Fd()), "", 0)
		_ = f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load module %s: %w", filepath.Base(f.Name()), err)
		}
	}
	return nil
}

// loadBeside loads several groups at once. The returned function waits for them.
func (s *setup) loadBeside(groups []moduleGroup) (wait func()) {
	var wg sync.WaitGroup
	for _, g := range groups {
		wg.Go(func() { s.note(g.load()) })
	}
	return wg.Wait
}
