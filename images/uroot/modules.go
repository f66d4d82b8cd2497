package uroot

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"ditto.vm/images/kernel"
)

// packedModule is a kernel module as it goes into the image.
type packedModule struct {
	name    string
	file    string // relative to /lib/modules/RELEASE, ending in .ko
	data    []byte
	depends []string // names
	aliases []string // patterns, as in modules.alias
}

// collectModules picks the modules of the image: the default ones that the
// kernel has, and the wanted ones, all with what they depend on.
func collectModules(k kernel.Kernel, wanted []string) ([]packedModule, error) {
	if k.ModulesDir == "" {
		if len(wanted) > 0 {
			return nil, fmt.Errorf("modules %s: kernel %s has no modules folder", strings.Join(wanted, ", "), k.Image)
		}
		return nil, nil
	}
	names, err := k.Available(defaultModules()...)
	if err != nil {
		return nil, err
	}
	mods, err := k.Modules(append(names, wanted...)...)
	if err != nil {
		return nil, err
	}
	packed := make([]packedModule, 0, len(mods))
	for _, m := range mods {
		rel, err := filepath.Rel(k.ModulesDir, m.Path)
		if err != nil {
			return nil, err
		}
		info, err := modinfoSection(m.Data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", m.Path, err)
		}
		p := packedModule{name: m.Name, file: plainName(rel), data: m.Data}
		p.depends, p.aliases = parseModinfo(info)
		packed = append(packed, p)
	}
	return packed, nil
}

// plainName takes the suffix of a compression off.
func plainName(file string) string {
	if i := strings.LastIndex(file, ".ko."); i > 0 {
		return file[:i+3]
	}
	return file
}

func modinfoSection(module []byte) ([]byte, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, errors.New("no .modinfo section")
	}
	return s.Data()
}

// parseModinfo reads the dependencies and aliases of a module: NUL-separated
// key=value pairs (include/linux/module.h).
func parseModinfo(section []byte) (depends, aliases []string) {
	for field := range bytes.SplitSeq(section, []byte{0}) {
		key, value, _ := strings.Cut(string(field), "=")
		switch key {
		case "depends":
			for d := range strings.SplitSeq(value, ",") {
				if d != "" {
					depends = append(depends, strings.ReplaceAll(d, "-", "_"))
				}
			}
		case "alias":
			if value != "" && !strings.ContainsAny(value, " \t\n") {
				aliases = append(aliases, value)
			}
		}
	}
	return depends, aliases
}

// modulesDep writes the text form of depmod's modules.dep: each file with all
// that it needs, directly and not, the deepest last.
func modulesDep(mods []packedModule) string {
	byName := map[string]packedModule{}
	for _, m := range mods {
		byName[m.name] = m
	}
	var b strings.Builder
	for _, m := range mods {
		b.WriteString(m.file + ":")
		seen := map[string]bool{m.name: true}
		for _, f := range needs(byName, m, seen) {
			b.WriteString(" " + f)
		}
		b.WriteString("\n")
	}
	return b.String()
}

func needs(byName map[string]packedModule, m packedModule, seen map[string]bool) []string {
	var direct, deeper []string
	for _, d := range m.depends {
		dep, ok := byName[d]
		if !ok || seen[d] {
			continue
		}
		seen[d] = true
		direct = append(direct, dep.file)
		deeper = append(deeper, needs(byName, dep, seen)...)
	}
	return append(direct, deeper...)
}

// modulesAlias writes the text form of depmod's modules.alias.
func modulesAlias(mods []packedModule) string {
	var b strings.Builder
	for _, m := range mods {
		for _, a := range m.aliases {
			b.WriteString("alias " + a + " " + m.name + "\n")
		}
	}
	return b.String()
}

// loadList is what init loads without being asked by a device.
func loadList(mods []packedModule, wanted []string) string {
	have := map[string]bool{}
	for _, m := range mods {
		have[m.name] = true
	}
	var b strings.Builder
	for _, name := range append(alwaysModules(), wanted...) {
		name = strings.ReplaceAll(name, "-", "_")
		if have[name] {
			b.WriteString(name + "\n")
		}
	}
	return b.String()
}
