package main

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// moduleIndex is what modules.dep and modules.alias of one kernel release say.
// It is small: the image holds only the modules a guest of ditto can need.
type moduleIndex struct {
	dir     string              // /lib/modules/RELEASE
	files   map[string]string   // normalized name -> file, relative to dir
	deps    map[string][]string // file -> files it needs
	aliases []moduleAlias
}

type moduleAlias struct{ pattern, module string }

// moduleName is the normalized name of the module in a file.
func moduleName(file string) string {
	base := path.Base(file)
	if i := strings.Index(base, ".ko"); i > 0 {
		base = base[:i]
	}
	return normalize(base)
}

// parseIndex reads the text forms of modules.dep and modules.alias as depmod
// writes them. Lines it does not know are skipped.
func parseIndex(dir, dep, alias string) *moduleIndex {
	x := &moduleIndex{dir: dir, files: map[string]string{}, deps: map[string][]string{}}
	for line := range strings.Lines(dep) {
		file, needs, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok || file == "" || strings.HasPrefix(file, "#") {
			continue
		}
		x.files[moduleName(file)] = file
		x.deps[file] = strings.Fields(needs)
	}
	for line := range strings.Lines(alias) {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == "alias" {
			x.aliases = append(x.aliases, moduleAlias{normalize(f[1]), normalize(f[2])})
		}
	}
	return x
}

// resolve returns the files to load for a module name, an alias or a device's
// modalias, each after what it needs. Nothing found is an empty result.
func (x *moduleIndex) resolve(name string) []string {
	name = normalize(name)
	var order []string
	seen := map[string]bool{}
	if file, ok := x.files[name]; ok {
		return x.closure(file, seen, order)
	}
	for _, a := range x.aliases {
		if file, ok := x.files[a.module]; ok && matchAlias(a.pattern, name) {
			order = x.closure(file, seen, order)
		}
	}
	return order
}

func (x *moduleIndex) closure(file string, seen map[string]bool, order []string) []string {
	if seen[file] {
		return order
	}
	seen[file] = true
	// depmod lists the deepest need last.
	for i := len(x.deps[file]) - 1; i >= 0; i-- {
		order = x.closure(x.deps[file][i], seen, order)
	}
	return append(order, file)
}

// loader loads modules once each and remembers what went wrong.
type loader struct {
	index  *moduleIndex
	params map[string]string // normalized module name -> parameters
	done   map[string]bool   // files tried
	loaded int
	insert func(path, params string) error
}

// newLoader reads the index of the running kernel. An image without modules
// for it gives an empty index and an error that says so.
func newLoader(modulesRoot, release string, words []word) (*loader, error) {
	l := &loader{params: moduleParams(words), done: map[string]bool{}, insert: insertModule}
	dir := path.Join(modulesRoot, release)
	dep, err := os.ReadFile(path.Join(dir, "modules.dep"))
	alias, _ := os.ReadFile(path.Join(dir, "modules.alias"))
	l.index = parseIndex(dir, string(dep), string(alias))
	if errors.Is(err, os.ErrNotExist) {
		have := "none"
		if es, _ := os.ReadDir(modulesRoot); len(es) > 0 {
			have = es[0].Name()
		}
		return l, fmt.Errorf("no modules for kernel %s in this initramfs (it has: %s)", release, have)
	}
	return l, err
}

// load loads what name resolves to. It returns whether anything was found.
func (l *loader) load(name string) (found bool, err error) {
	var errs []error
	for _, file := range l.index.resolve(name) {
		found = true
		if l.done[file] {
			continue
		}
		l.done[file] = true
		err := l.insert(path.Join(l.index.dir, file), l.params[moduleName(file)])
		switch {
		case err == nil:
			l.loaded++
		case !errors.Is(err, unix.EEXIST):
			errs = append(errs, fmt.Errorf("module %s: %w", moduleName(file), err))
		}
	}
	return found, errors.Join(errs...)
}

func insertModule(file, params string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), params, 0)
}

// moduleParams collects NAME.PARAM=VALUE words, which the kernel leaves to
// whoever loads module NAME.
func moduleParams(words []word) map[string]string {
	params := map[string]string{}
	for _, w := range words {
		mod, param, ok := strings.Cut(w.key, ".")
		if !ok || mod == "ditto" || mod == "" || param == "" {
			continue
		}
		if w.hasValue {
			param += "=" + w.value
		}
		mod = normalize(mod)
		params[mod] = strings.TrimSpace(params[mod] + " " + param)
	}
	return params
}

// modprobe is the program the kernel runs as /sbin/modprobe for a module it
// wants: modprobe -q -- NAME.
func modprobe(args []string) int {
	quiet := false
	for len(args) > 0 && strings.HasPrefix(args[0], "-") {
		quiet = quiet || args[0] == "-q"
		last := args[0] == "--"
		args = args[1:]
		if last {
			break
		}
	}
	if len(args) == 0 {
		fmt.Fprintln(os.Stderr, "usage: modprobe [-q] NAME [PARAM=VALUE...]")
		return 2
	}
	cmdline, _ := os.ReadFile("/proc/cmdline")
	l, err := newLoader("/lib/modules", kernelRelease(), splitCmdline(string(cmdline)))
	if err == nil && len(args) > 1 {
		l.params[normalize(args[0])] = strings.Join(args[1:], " ")
	}
	found := false
	if err == nil {
		found, err = l.load(args[0])
	}
	if err == nil && !found {
		err = fmt.Errorf("module %s is not in this initramfs", args[0])
	}
	if err != nil {
		if !quiet {
			fmt.Fprintln(os.Stderr, "modprobe:", err)
		}
		return 1
	}
	return 0
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}
