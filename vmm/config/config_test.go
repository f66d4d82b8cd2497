package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ditto.vm/images/disk"
	"ditto.vm/memory"
)

func TestDefaultIsValid(t *testing.T) {
	c := Default()
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
}

func TestParse(t *testing.T) {
	got, err := Parse([]byte(`
name: web
cpus: 2
memory: {size: 2GiB, hugepages: off, backing: memfd, tracker: kvm-log, names: off}
kernel: ./vmlinuz
cmdline: {append: quiet}
command: [ls, -l]
disks:
- {path: root.img, serial: R1, cache: none, queues: 3}
- {path: /data.img, readonly: true}
nets:
- {mode: user, forwards: ["8080:80", "0.0.0.0:53:53/udp"], mtu: 9000}
- {mode: tap, tap: tap7, bridge: br0, mac: "02:00:00:00:00:01"}
rng: off
balloon: {size: 64M, stats-interval: 10s, free-page-reporting: off}
console: virtio
sandbox: off
on-reboot: stop
reboot-limit: 3
`))
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Name: "web", CPUs: 2, CPU: CPUHost,
		Memory: Memory{Size: 2 << 30, HugePages: memory.HugePagesOff, Backing: memory.Memfd, Tracker: memory.TrackerKVMLog},
		Kernel: "./vmlinuz", Initrd: InitrdURoot, Cmdline: Cmdline{Append: "quiet"}, Command: []string{"ls", "-l"},
		Disks: []Disk{{Path: "root.img", Serial: "R1", Cache: disk.CacheNone, Queues: 3}, {Path: "/data.img", ReadOnly: true}},
		Nets: []Net{
			{Mode: NetUser, MTU: 9000, Forwards: []Forward{{"tcp", "", 8080, 80}, {"udp", "0.0.0.0", 53, 53}}},
			{Mode: NetTap, Tap: "tap7", Bridge: "br0", MAC: "02:00:00:00:00:01"},
		},
		Balloon: Balloon{Enabled: true, Size: 64 << 20, StatsInterval: Duration(10 * time.Second), DeflateOnOOM: true},
		Console: ConsoleVirtio, OnReboot: RebootStop, RebootLimit: 3,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if err := got.Validate(); err != nil {
		t.Error(err)
	}

	out, err := got.YAML()
	if err != nil {
		t.Fatal(err)
	}
	again, err := Parse(out)
	if err != nil {
		t.Fatalf("%v in\n%s", err, out)
	}
	if diff := cmp.Diff(got, again); diff != "" {
		t.Errorf("the file written differs from the file read, -want +got:\n%s\n%s", diff, out)
	}
}

func TestParseNets(t *testing.T) {
	for _, test := range []struct {
		yaml string
		want int
	}{
		{"cpus: 1", 1}, {"nets: null", 1}, {"nets: []", 0}, {"nets: [{mode: none}]", 0},
		{"nets: [{mode: user}, {mode: none}, {mode: tap}]", 2},
	} {
		c, err := Parse([]byte(test.yaml))
		if err != nil || len(c.Nets) != test.want {
			t.Errorf("%s: %d nets, %v; want %d", test.yaml, len(c.Nets), err, test.want)
		}
	}
}

func TestParseErrors(t *testing.T) {
	for _, test := range []struct{ yaml, want string }{
		{"cpuses: 1", `unknown field "cpuses"`},
		{"cpus: two", `cpus: a string where a value of type int belongs`},
		{"memory: {sise: 1G}", `unknown field "sise"`},
		{"cpus: 1\ncpus: 2", `"cpus" already set`},
		{"memory: 12Q", `"12Q" is not a size`},
		{"memory: -1", `is not a size`},
		{"memory: {hugepages: 4M}", `unknown huge page size "4M"`},
		{"memory: {tracker: kvm}", `unknown tracker "kvm"`},
		{"memory: {names: maybe}", `neither on nor off`},
		{"disks: [{path: a, cache: unsafe}]", `unknown cache mode "unsafe": use writeback, none or writethrough`},
		{"nets: [{mode: bridge}]", `unknown network "bridge": use user, tap, socket or none`},
		{"nets: [{mode: user, forwards: [80]}]", ``},
		{"sandbox: maybe", `neither on nor off`},
		{"a: [", `line 1`},
	} {
		_, err := Parse([]byte(test.yaml))
		if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: error %q, want one line with %q", test.yaml, err, test.want)
		}
	}
}

func TestLoadResolvesPaths(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "vm.yaml")
	if err := os.WriteFile(file, []byte("kernel: debian-6.12\ninitrd: i.cpio\ndisks: [{path: d.img}]\nnets: [{mode: socket, path: s.sock}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	got := []string{c.Kernel, c.Initrd, c.Disks[0].Path, c.Nets[0].Path}
	want := []string{"debian-6.12", filepath.Join(dir, "i.cpio"), filepath.Join(dir, "d.img"), filepath.Join(dir, "s.sock")}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if _, err := Load(filepath.Join(dir, "absent.yaml")); !os.IsNotExist(unwrapAll(err)) {
		t.Errorf("absent file: %v", err)
	}
	big := filepath.Join(dir, "big.yaml")
	if err := os.WriteFile(big, make([]byte, maxFileBytes+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(big); err == nil || !strings.Contains(err.Error(), "larger than 1MiB") {
		t.Errorf("big file: %v", err)
	}
}

func unwrapAll(err error) error {
	for {
		inner, ok := err.(interface{ Unwrap() error })
		if !ok || inner.Unwrap() == nil {
			return err
		}
		if os.IsNotExist(err) {
			return err
		}
		err = inner.Unwrap()
	}
}

func TestValidate(t *testing.T) {
	many := make([]Disk, MaxDevices)
	for i := range many {
		many[i].Path = string(rune('A' + i))
	}
	for _, test := range []struct {
		field  string
		change func(*Config)
	}{
		{"name", func(c *Config) { c.Name = "../x" }},
		{"name", func(c *Config) { c.Name = strings.Repeat("a", MaxNameBytes+1) }},
		{"cpus", func(c *Config) { c.CPUs = 0 }},
		{"cpus", func(c *Config) { c.CPUs = MaxCPUs + 1 }},
		{"memory.size", func(c *Config) { c.Memory.Size = 4095 }},
		{"memory.size", func(c *Config) { c.Memory.Size = 2 << 40 }},
		{"memory.size", func(c *Config) { c.Memory.Size, c.Memory.HugePages = 3<<20, memory.HugePages2M }},
		{"memory.hugepages", func(c *Config) { c.Memory.HugePages = 17 }},
		{"memory.tracker", func(c *Config) { c.Memory.Tracker = 9 }},
		{"memory.tracker", func(c *Config) { c.Memory.Tracker, c.Memory.Backing = memory.TrackerWPAsync, memory.Memfd }},
		{"initrd", func(c *Config) { c.Initrd = "" }},
		{"cmdline.append", func(c *Config) { c.Cmdline.Append = "a\nb" }},
		{"cmdline.replace", func(c *Config) { c.Cmdline.Replace = strings.Repeat("a", MaxCommandLineBytes+1) }},
		{"command", func(c *Config) { c.Command, c.Initrd = []string{"ls"}, InitrdNone }},
		{"command", func(c *Config) { c.Command = []string{""} }},
		{"command", func(c *Config) { c.Command = []string{"a", "\x00"} }},
		{"command", func(c *Config) { c.Command = []string{strings.Repeat("a", MaxCommandBytes)} }},
		{"disks[0].path", func(c *Config) { c.Disks = []Disk{{}} }},
		{"disks[0].serial", func(c *Config) { c.Disks = []Disk{{Path: "a", Serial: "123456789012345678901"}} }},
		{"disks[0].cache", func(c *Config) { c.Disks = []Disk{{Path: "a", Cache: 9}} }},
		{"disks[1].queues", func(c *Config) { c.Disks = []Disk{{Path: "a"}, {Path: "b", Queues: -1}} }},
		{"disks[1].path", func(c *Config) { c.Disks = []Disk{{Path: "a"}, {Path: "a", ReadOnly: true}} }},
		{"disks and nets", func(c *Config) { c.Disks = many }},
		{"nets[0].tap", func(c *Config) { c.Nets = []Net{{Tap: "t"}} }},
		{"nets[0].tap", func(c *Config) { c.Nets = []Net{{Mode: NetTap, Tap: "sixteencharacter"}} }},
		{"nets[0].bridge", func(c *Config) { c.Nets = []Net{{Mode: NetTap, Bridge: "a/b"}} }},
		{"nets[0].path", func(c *Config) { c.Nets = []Net{{Mode: NetSocket}} }},
		{"nets[0].mac", func(c *Config) { c.Nets = []Net{{MAC: "01:00:00:00:00:00"}} }},
		{"nets[0].mac", func(c *Config) { c.Nets = []Net{{MAC: "00:00:00:00:00:00"}} }},
		{"nets[1].mac", func(c *Config) { c.Nets = []Net{{MAC: "02:00:00:00:00:01"}, {MAC: "02:00:00:00:00:01"}} }},
		{"nets[0].mtu", func(c *Config) { c.Nets = []Net{{MTU: 67}} }},
		{"nets[0].mode", func(c *Config) { c.Nets = []Net{{Mode: 8}} }},
		{"nets[0].forwards", func(c *Config) { c.Nets = []Net{{Mode: NetTap, Forwards: []Forward{{"tcp", "", 1, 1}}}} }},
		{"nets[0].forwards[1]", func(c *Config) { c.Nets = []Net{{Forwards: []Forward{{"tcp", "", 1, 1}, {"tcp", "127.0.0.1", 1, 2}}}} }},
		{"balloon.size", func(c *Config) { c.Balloon.Size = c.Memory.Size + 4096 }},
		{"balloon.size", func(c *Config) { c.Balloon.Size = 1 }},
		{"balloon.size", func(c *Config) { c.Balloon.Size, c.Balloon.Enabled = 4096, false }},
		{"balloon.stats-interval", func(c *Config) { c.Balloon.StatsInterval = -1 }},
		{"console", func(c *Config) { c.Console = 2 }},
		{"on-reboot", func(c *Config) { c.OnReboot = -1 }},
		{"reboot-limit", func(c *Config) { c.RebootLimit = -1 }},
	} {
		c := Default()
		test.change(&c)
		err, _ := c.Validate().(*Error)
		if err == nil || err.Field != test.field || strings.Contains(err.Error(), "\n") {
			t.Errorf("got %v, want an error about %s", err, test.field)
		}
	}
}
