package kernel

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/u-root/u-root/pkg/kmodule"
)

// maxModuleBytes bounds a decompressed module. The largest of Debian's amd64
// modules (amdgpu) has under 30 MiB.
const maxModuleBytes = 256 << 20

// ErrNoModule says that a kernel has no module of a name.
var ErrNoModule = errors.New("no such module")

// Module is one loadable kernel module.
type Module struct {
	Name string // as lsmod prints it, with underscores
	Path string // of the .ko, .ko.xz, .ko.zst or .ko.gz
	Data []byte // decompressed
}

// moduleSet resolves the modules of one kernel.
type moduleSet struct {
	paths   map[string]string // name to path
	builtin map[string]bool
	done    map[string]bool
	busy    map[string]bool // being resolved, to find cycles
	order   []Module
}

// Modules returns the named modules and all they depend on, decompressed, in an
// order in which they can be loaded. Names that are built into the kernel are
// left out. A name that the kernel has neither built in nor as a module is
// [ErrNoModule].
func (k Kernel) Modules(names ...string) ([]Module, error) {
	if k.ModulesDir == "" {
		return nil, fmt.Errorf("kernel %s has no modules folder", k.Image)
	}
	set, err := openModules(k.ModulesDir)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if err := set.add(moduleName(name)); err != nil {
			return nil, fmt.Errorf("kernel %s: module %s: %w", k.Version, name, err)
		}
	}
	return set.order, nil
}

// HasModule tells whether the kernel has name built in or as a module.
func (k Kernel) HasModule(name string) bool {
	if k.ModulesDir == "" {
		return false
	}
	set, err := openModules(k.ModulesDir)
	if err != nil {
		return false
	}
	name = moduleName(name)
	return set.builtin[name] || set.paths[name] != ""
}

func openModules(dir string) (*moduleSet, error) {
	set := &moduleSet{
		paths:   map[string]string{},
		builtin: map[string]bool{},
		done:    map[string]bool{},
		busy:    map[string]bool{},
	}
	text, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("kernel modules: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		set.builtin[moduleName(strings.TrimSpace(line))] = true
	}
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !d.IsDir() && isModuleFile(path) {
			set.paths[moduleName(path)] = path
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("kernel modules: %w", err)
	}
	return set, nil
}

// moduleName turns a path or a name as people write it into the kernel's name.
func moduleName(path string) string {
	base := filepath.Base(path)
	if i := strings.Index(base, ".ko"); i > 0 {
		base = base[:i]
	}
	return strings.ReplaceAll(base, "-", "_")
}

func isModuleFile(path string) bool {
	base := filepath.Base(path)
	i := strings.LastIndex(base, ".ko")
	if i <= 0 {
		return false
	}
	switch base[i:] {
	case ".ko", ".ko.xz", ".ko.zst", ".ko.gz":
		return true
	}
	return false
}

// add appends name after all it depends on.
func (s *moduleSet) add(name string) error {
	if s.done[name] || s.builtin[name] {
		return nil
	}
	if s.busy[name] {
		return fmt.Errorf("%s depends on itself", name)
	}
	path, ok := s.paths[name]
	if !ok {
		return fmt.Errorf("%s: %w", name, ErrNoModule)
	}
	data, err := readModule(path)
	if err != nil {
		return err
	}
	info, err := readModinfo(data)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	s.busy[name] = true
	for _, dep := range info.soft {
		// A soft dependency may be built in, an alias, or absent.
		if err := s.add(dep); err != nil && !errors.Is(err, ErrNoModule) {
			return err
		}
	}
	for _, dep := range info.hard {
		if err := s.add(dep); err != nil {
			return err
		}
	}
	delete(s.busy, name)
	s.done[name] = true
	s.order = append(s.order, Module{Name: name, Path: path, Data: data})
	return nil
}

func readModule(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	r, err := kmodule.CompressionReader(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	data, err := io.ReadAll(io.LimitReader(r, maxModuleBytes+1))
	if err != nil {
		return nil, fmt.Errorf("decompress %s: %w", path, err)
	}
	if len(data) > maxModuleBytes {
		return nil, fmt.Errorf("%s: decompresses to more than %d bytes", path, maxModuleBytes)
	}
	return data, nil
}

// modinfo is what a module says about its dependencies.
type modinfo struct {
	hard []string // must be loaded before
	soft []string // should be loaded before, if there are any
}

// readModinfo finds the .modinfo section of a module.
func readModinfo(module []byte) (modinfo, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return modinfo{}, fmt.Errorf("not a module: %w", err)
	}
	sec := f.Section(".modinfo")
	if sec == nil {
		return modinfo{}, errors.New("not a module: no .modinfo section")
	}
	data, err := sec.Data()
	if err != nil {
		return modinfo{}, fmt.Errorf("not a module: %w", err)
	}
	return parseModinfo(data), nil
}

// parseModinfo reads NUL-separated key=value pairs (include/linux/module.h).
func parseModinfo(data []byte) modinfo {
	var info modinfo
	for field := range bytes.SplitSeq(data, []byte{0}) {
		key, value, ok := strings.Cut(string(field), "=")
		if !ok {
			continue
		}
		switch key {
		case "depends":
			for dep := range strings.SplitSeq(value, ",") {
				if dep != "" {
					info.hard = append(info.hard, moduleName(dep))
				}
			}
		case "softdep":
			info.soft = append(info.soft, preDeps(value)...)
		}
	}
	return info
}

// preDeps returns the modules behind "pre:" in a soft dependency.
func preDeps(softdep string) []string {
	var deps []string
	pre := false
	for word := range strings.FieldsSeq(softdep) {
		switch {
		case strings.HasSuffix(word, ":"):
			pre = word == "pre:"
		case pre:
			deps = append(deps, moduleName(word))
		}
	}
	return deps
}
