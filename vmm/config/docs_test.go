package config

import (
	"encoding/json"
	"os"
	"reflect"
	"strings"
	"testing"
)

// TestDocumentation: the file in docs/config.md is valid and names every key.
func TestDocumentation(t *testing.T) {
	page, err := os.ReadFile("../../docs/config.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(page), "```yaml\n")
	file, _, found := strings.Cut(rest, "```")
	if !found {
		t.Fatal("no YAML in docs/config.md")
	}
	c, err := Parse([]byte(file))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
	for _, v := range []any{Config{}, Memory{}, Cmdline{}, Disk{}, Net{}, Balloon{}} {
		typ := reflect.TypeOf(v)
		for i := range typ.NumField() {
			key, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			if !strings.Contains(file, key+":") {
				t.Errorf("%s.%s: no key %q on the page", typ.Name(), typ.Field(i).Name, key)
			}
		}
	}
	// What the page calls a default is one.
	want, got := Default(), c
	got.Name, got.Kernel, got.Cmdline, got.Command, got.Disks, got.Nets = "", "", Cmdline{}, nil, nil, want.Nets
	a, _ := json.Marshal(want)
	b, _ := json.Marshal(got)
	if string(a) != string(b) {
		t.Errorf("defaults differ:\n%s\n%s", a, b)
	}
}
