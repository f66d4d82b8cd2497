// Package ditto_test states what the module's packages may import.
package ditto_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "ditto.vm/"

// edge allows the packages below from to import the packages below to.
type edge struct{ from, to, why string }

// edges is the import graph of the module, without tests. Besides, everything
// may import its own tree. Of the prefixes that fit a package the longest
// decides.
var edges = []edge{
	{"cmd/ditto", "vmm", "a command line starts machines and asks them"},
	{"cmd/ditto", "migration", "migrate, snapshot and restore are commands"},
	{"cmd/ditto", "images", "image builds and fetches what machines boot"},
	{"cmd/ditto", "guest", "image hands the sources of the guest's init to the builder"},
	{"cmd/ditto", "guest/boot", "a kernel that cannot boot has an exit code by its cause"},
	{"cmd/ditto", "internal/netd", "a network that does not start has an exit code by its cause"},
	{"cmd/ditto", "internal/doctor", "doctor tells what this host can do"},
	{"cmd/ditto", "internal/memmap", "memmap draws what a machine says of its memory"},
	{"cmd/ditto-netd", "internal/netd", "the stream protocol is shared with the process that starts it"},
	{"cmd/ditto-lab", "internal/lab", "the command is a thin cover of it"},
	{"cmd/ditto-lab", "internal/labrun", "runs lists of tests in the lab"},
	{"cmd/ditto-bench", "internal/bench", "the command is a thin cover of it"},

	{"vmm", "migration", "the control API starts migrations and snapshots"},
	{"vmm", "devices", "a machine is composed of devices"},
	{"vmm", "guest", "a machine is loaded with a kernel and its tables"},
	{"vmm", "images", "disks are layers"},
	{"vmm", "memory", "a machine has memory"},
	{"vmm", "internal/tap", "network backends are opened before rights are dropped"},
	{"vmm", "internal/netd", "the user-mode network is a child process"},
	{"vmm", "internal/parallel", "memory is restored by many hands"},

	{"migration", "devices", "device sections are what a peer sends"},
	{"migration", "guest", "the guest's identity changes when it is cloned"},
	{"migration", "images", "pages are named by blocks of layers"},
	{"migration", "memory", "pages are what moves"},
	{"migration", "internal/parallel", "pages are stored and read by many hands"},

	{"devices", "memory", "devices are given guest memory, and nothing of KVM"},
	{"guest", "memory", "boot code is put into guest memory"},
	{"images", "memory", "pages of guest memory are compared with blocks"},

	{"internal/doctor", "vmm", "it probes with the code that will run"},
	{"internal/doctor", "memory", "it probes with the code that will run"},
	{"internal/doctor", "internal/tap", "it probes with the code that will run"},
	{"internal/lab", "images", "the emulated host boots a Debian kernel"},
	{"internal/labrun", "internal/lab", "it boots one lab for many tests"},
	{"internal/labrun", "vmm/kvm", "a machine whose KVM runs Linux needs no lab"},
	{"internal/labrun", "internal/labtest", "it reads the figures that tests state"},
	{"internal/labrun", "internal/proofs", "it writes the figures down"},
	{"cmd/ditto-lab", "internal/material", "it prepares what the tests boot"},
	{"internal/material", "images", "it is made of images"},
	{"internal/material", "guest", "the u-root image holds the guest's init"},
	{"internal/migratetest", "memory", "its machines are memory"},
	{"internal/migratetest", "migration", "its machines migrate"},
	{"internal/e2e", "internal/labtest", "its tests run in the lab"},
	{"internal/e2e", "internal/material", "its tests boot it"},
	{"internal/bench", "internal/material", "benchmarks boot what the tests boot"},
	{"internal/bench", "internal/lab", "comparisons with QEMU need a KVM that runs Linux"},
	{"internal/bench", "images", "both sides boot the same images"},
	{"internal/bench", "guest", "payloads are measured natively"},
	{"internal/bench", "vmm", "it measures the code that runs"},
	{"internal/bench", "memory", "it measures the code that runs"},
	{"internal/bench", "internal/trackertest", "trackers are measured on its bare machine"},
	{"internal/trackertest", "memory", "it holds trackers to their contract"},
	{"internal/trackertest", "vmm/kvm", "its machine is KVM and nothing else"},
	{"internal/trackertest", "guest", "payloads write while trackers look"},
}

// alone are the trees that import nothing of the module, and why.
var alone = map[string]string{
	"memory":            "everything stands on it",
	"vmm/kvm":           "one method per ioctl, nothing else",
	"migration/wire":    "the wire format outlives the code around it",
	"migration/pki":     "certificates and TLS, nothing of machines",
	"guest/init":        "it runs inside guests",
	"internal/netd":     "shared by two processes that must stay small",
	"internal/tap":      "netlink only",
	"internal/labtest":  "any test may import it",
	"internal/proofs":   "Markdown only",
	"internal/memmap":   "it draws data, and knows nothing of machines",
	"internal/parallel": "goroutines and nothing else",
}

// fence keeps a foreign module in its place.
type fence struct {
	foreign []string // import path prefixes
	// direct lists the trees that may import it themselves.
	direct []string
	// reach lists the trees that may depend on it, even indirectly; nil means
	// whatever imports those in direct.
	reach []string
	why   string
}

var fences = []fence{
	{
		foreign: []string{"github.com/containers/gvisor-tap-vsock", "gvisor.dev/gvisor"},
		direct:  []string{"cmd/ditto-netd"}, reach: []string{"cmd/ditto-netd"},
		why: "a network stack costs every VM process 4 ms and most of its memory",
	},
	{
		foreign: []string{"github.com/bobuhiro11/gokvm"},
		direct:  []string{"vmm/kvm"}, reach: []string{"vmm", "cmd/ditto", "cmd/ditto-bench", "cmd/ditto-lab", "internal/doctor", "internal/bench", "internal/labrun", "internal/trackertest"},
		why: "KVM is called in one place; devices never see it",
	},
	{
		foreign: []string{"github.com/u-root/mkuimage", "github.com/u-root/gobusybox"},
		direct:  []string{}, reach: []string{},
		why: "the builder runs as a process of its own; its initializers must not run in a VM process",
	},
	{
		foreign: []string{"github.com/vishvananda/netlink"},
		direct:  []string{"internal/tap", "internal/lab/init", "internal/doctor"},
		why:     "only these configure networks",
	},
	{
		foreign: []string{"github.com/spf13/cobra"},
		direct:  []string{"cmd"}, reach: []string{"cmd"},
		why: "flags are for commands",
	},
	{
		foreign: []string{"github.com/vbauerster/mpb", "golang.org/x/term"},
		direct:  []string{"cmd"}, reach: []string{"cmd"},
		why: "terminals are for commands",
	},
	{
		foreign: []string{"golang.org/x/image"},
		direct:  []string{"internal/memmap"}, reach: []string{"internal/memmap", "cmd/ditto"},
		why: "letters in pictures",
	},
	{
		foreign: []string{"github.com/elastic/go-seccomp-bpf", "github.com/landlock-lsm/go-landlock"},
		direct:  []string{"vmm/sandbox", "cmd/ditto-netd", "internal/doctor"},
		why:     "rights are dropped in one place a process",
	},
}

// goPackage is what go list says of a package. Tests may import more.
type goPackage struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func listAll(t *testing.T) []goPackage {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports,Deps", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []goPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return pkgs
		}
		if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

// below tells whether a package path lies in the tree at prefix.
func below(path, prefix string) bool {
	return path == prefix || strings.HasPrefix(path, prefix+"/")
}

func inTree(path string) (string, bool) { return strings.CutPrefix(path, module) }

// checkEdge returns why from must not import to, or nil.
func checkEdge(from, to string) error {
	for tree, why := range alone {
		if below(from, tree) && !below(to, tree) {
			return fmt.Errorf("%s imports %s, but %s imports nothing of the module: %s", from, to, tree, why)
		}
	}
	// Of the prefixes that have edges the longest one decides.
	best := ""
	for _, e := range edges {
		if below(from, e.from) && len(e.from) > len(best) {
			best = e.from
		}
	}
	if tree(from) == tree(to) {
		return nil
	}
	for _, e := range edges {
		if e.from == best && below(to, e.to) {
			return nil
		}
	}
	return fmt.Errorf("%s imports %s: no edge allows it; state one with its reason, or move the code", from, to)
}

// tree is the top of the tree that a package lies in: its first element, or
// two below cmd and internal, whose children are strangers to each other.
func tree(path string) string {
	parts := strings.SplitN(path, "/", 3)
	if (parts[0] == "cmd" || parts[0] == "internal") && len(parts) > 1 {
		return parts[0] + "/" + parts[1]
	}
	return parts[0]
}

func TestImportGraph(t *testing.T) {
	for _, p := range listAll(t) {
		from, ok := inTree(p.ImportPath)
		if !ok {
			continue
		}
		for _, imp := range p.Imports {
			if to, ok := inTree(imp); ok {
				if err := checkEdge(from, to); err != nil {
					t.Error(err)
				}
			}
		}
	}
}

func TestFences(t *testing.T) {
	for _, p := range listAll(t) {
		from, ok := inTree(p.ImportPath)
		if !ok {
			continue
		}
		for _, f := range fences {
			if err := f.check(from, p); err != nil {
				t.Error(err)
			}
		}
	}
}

// check returns how a package breaks the fence, or nil.
func (f fence) check(from string, p goPackage) error {
	within := func(trees []string) bool {
		return slices.ContainsFunc(trees, func(tree string) bool { return below(from, tree) })
	}
	for _, foreign := range f.foreign {
		hit := func(imp string) bool { return below(imp, foreign) }
		if slices.ContainsFunc(p.Imports, hit) && !within(f.direct) {
			return fmt.Errorf("%s imports %s, which only %v may: %s", from, foreign, f.direct, f.why)
		}
		if f.reach != nil && slices.ContainsFunc(p.Deps, hit) && !within(f.reach) {
			return fmt.Errorf("%s depends on %s, which only %v may: %s", from, foreign, f.reach, f.why)
		}
	}
	return nil
}

// TestCheckEdge shows that the test can fail.
func TestCheckEdge(t *testing.T) {
	for _, tc := range []struct {
		from, to string
		ok       bool
	}{
		{"cmd/ditto", "vmm/config", true},
		{"cmd/ditto/internal/hub", "vmm", true},
		{"cmd/ditto", "internal/lab", false},
		{"cmd/ditto", "cmd/ditto-netd", false},
		{"cmd/ditto", "memory", false},
		{"vmm", "vmm/kvm", true},
		{"vmm/registry", "vmm/config", true},
		{"vmm/kvm", "memory", false},
		{"vmm/kvm", "vmm", false},
		{"memory", "devices", false},
		{"devices/virtio/blk", "devices/virtio", true},
		{"devices/virtio/blk", "memory", true},
		{"devices/virtio/blk", "vmm/kvm", false},
		{"devices/virtio/blk", "images/disk", false},
		{"guest/boot", "devices", false},
		{"migration", "vmm", false},
		{"migration/wire", "memory", false},
		{"internal/lab", "internal/lab/wire", true},
		{"internal/lab", "vmm", false},
		{"internal/labrun", "internal/lab", true},
		{"brandnew", "memory", false},
		{"brandnew/a", "brandnew/b", true},
	} {
		if err := checkEdge(tc.from, tc.to); (err == nil) != tc.ok {
			t.Errorf("%s -> %s: allowed %v, want %v (%v)", tc.from, tc.to, err == nil, tc.ok, err)
		}
	}
	f := fences[1]
	if f.check("devices/virtio", goPackage{Deps: []string{"github.com/bobuhiro11/gokvm/kvm"}}) == nil {
		t.Error("a device that depends on gokvm passes the fence")
	}
	if f.check("vmm", goPackage{Imports: []string{"github.com/bobuhiro11/gokvm/kvm"}}) == nil {
		t.Error("a direct import of gokvm outside vmm/kvm passes the fence")
	}
}

// TestUnsafeFiles keeps unsafe in files whose name says so. Tests may compare
// the sizes of structures, and generated code does as it likes.
func TestUnsafeFiles(t *testing.T) {
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "out" || d.Name() == "bin") {
			return filepath.SkipDir
		}
		name := d.Name()
		if d.IsDir() || !strings.HasSuffix(name, ".go") {
			return nil
		}
		for _, suffix := range []string{"_unsafe.go", "_test.go", ".pb.go"} {
			if strings.HasSuffix(name, suffix) {
				return nil
			}
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, imp := range f.Imports {
			if imp.Path.Value == `"unsafe"` {
				t.Errorf("%s imports unsafe: only files called *_unsafe.go may", path)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
