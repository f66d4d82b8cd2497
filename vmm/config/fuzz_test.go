package config

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// FuzzParse checks that no file crashes the reader, that errors are one line,
// and that a valid configuration survives being written and read again.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		"", "name: a", "memory: 1G", "memory: {size: 2G, hugepages: off}",
		"disks: [{path: a, cache: none, readonly: yes}]",
		"nets: [{mode: user, forwards: ['8080:80', '[::1]:1:2/udp']}, {mode: none}]",
		"balloon: {size: 4K, stats-interval: 10s}\nconsole: virtio",
		"a: &a [*a]", "{\"cpus\": 3}", "command: [ls, -l]", "cpus: 1e3", "nets: [null]",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse(data)
		if err == nil {
			err = c.Validate()
		}
		if err != nil {
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("error of several lines: %q", err)
			}
			return
		}
		out, err := c.YAML()
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse(out)
		if err != nil {
			t.Fatalf("%v in\n%s", err, out)
		}
		if diff := cmp.Diff(c, again, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("-read +read again:\n%s", diff)
		}
	})
}

// FuzzFlags checks the parsers of --disk and --net values.
func FuzzFlags(f *testing.F) {
	for _, seed := range []string{"a.img,ro,cache=none", "a,,b", "user,forward=1:2", "tap,tap=t0,bridge=br0", "path=x,queues=9"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if d, err := ParseDisk(s); err == nil && d.Path == "" {
			t.Errorf("%q: a disk without a path", s)
		}
		n, err := ParseNet(s)
		if err != nil {
			return
		}
		for _, forward := range n.Forwards {
			var again Forward
			if err := again.UnmarshalText([]byte(forward.String())); err != nil || again != forward {
				t.Errorf("%+v came back as %+v, %v", forward, again, err)
			}
		}
	})
}
