package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"sigs.k8s.io/yaml"

	"ditto.vm/memory"
)

// maxFileBytes bounds a configuration file; a real one has a few hundred
// bytes.
const maxFileBytes = 1 << 20

// Load reads the YAML file at path over [Default]. Relative paths in it are
// relative to its folder. The result is not validated yet: flags may follow.
func Load(path string) (Config, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Config{}, fmt.Errorf("configuration: %w: check the path, or make one with 'ditto run --print-config'", err)
	}
	if err != nil {
		return Config{}, fmt.Errorf("configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return Config{}, fmt.Errorf("configuration: %w", err)
	}
	if len(data) > maxFileBytes {
		return Config{}, fmt.Errorf("configuration %s: larger than %s: not a ditto configuration", path, Bytes(maxFileBytes))
	}
	c, err := Parse(data)
	if err != nil {
		return Config{}, fmt.Errorf("configuration %s: %w", path, err)
	}
	folder, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return Config{}, fmt.Errorf("configuration %s: %w", path, err)
	}
	c.ResolvePaths(folder)
	return c, nil
}

// Parse reads YAML over [Default]. Unknown and repeated keys are refused.
func Parse(data []byte) (Config, error) {
	c := Default()
	c.Nets = nil
	if err := yaml.UnmarshalStrict(data, &c); err != nil {
		return Config{}, oneLine(err)
	}
	if c.Nets == nil {
		c.Nets = DefaultNets()
	}
	c.dropNoNets()
	return c, nil
}

// YAML returns c as a configuration file: [Parse] of it gives c again.
func (c Config) YAML() ([]byte, error) {
	if c.Nets == nil {
		c.Nets = DefaultNets()
	}
	return yaml.Marshal(c)
}

// dropNoNets removes the entries that say there is no network.
func (c *Config) dropNoNets() {
	kept := make([]Net, 0, len(c.Nets))
	for _, n := range c.Nets {
		if n.Mode != NetNone {
			kept = append(kept, n)
		}
	}
	c.Nets = kept
}

// SetNets replaces the networks; entries of mode none are dropped.
func (c *Config) SetNets(nets []Net) {
	c.Nets = nets
	c.dropNoNets()
}

// ResolvePaths makes relative paths absolute, starting from folder. A kernel
// without a slash stays as it is: it may be the name of a cached one.
func (c *Config) ResolvePaths(folder string) {
	resolve := func(path *string) {
		if *path != "" && !filepath.IsAbs(*path) {
			*path = filepath.Join(folder, *path)
		}
	}
	if strings.ContainsRune(c.Kernel, '/') {
		resolve(&c.Kernel)
	}
	if c.Initrd != InitrdURoot && c.Initrd != InitrdNone {
		resolve(&c.Initrd)
	}
	if c.CPU != CPUHost && c.CPU != CPUBaseline {
		resolve(&c.CPU)
	}
	for i := range c.Disks {
		resolve(&c.Disks[i].Path)
	}
	for i := range c.Nets {
		resolve(&c.Nets[i].Path)
	}
}

// UnmarshalJSON accepts a bare size, or the object with its keys. YAML reads a bare off as a boolean, which is understood here.
func (m *Memory) UnmarshalJSON(data []byte) error {
	if len(data) > 0 && data[0] != '{' {
		return m.Size.UnmarshalJSON(data)
	}
	type plain Memory
	fields := struct {
		*plain
		HugePages json.RawMessage `json:"hugepages"`
	}{plain: (*plain)(m)}
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&fields); err != nil {
		return err
	}
	switch string(fields.HugePages) {
	case "", "null":
		return nil
	case "false":
		m.HugePages = memory.HugePagesOff
		return nil
	}
	var s string
	if err := json.Unmarshal(fields.HugePages, &s); err != nil {
		return fmt.Errorf("unknown huge page size %s: use thp, 2M, 1G or off", fields.HugePages)
	}
	return m.HugePages.UnmarshalText([]byte(s))
}

// oneLine strips what the decoders say about themselves from an error.
func oneLine(err error) error {
	var wrong *json.UnmarshalTypeError
	if errors.As(err, &wrong) && wrong.Field != "" {
		return fmt.Errorf("%s: a %s where a value of type %s belongs", wrong.Field, wrong.Value, wrong.Type.Kind())
	}
	s := err.Error()
	for _, prefix := range []string{
		"error converting YAML to JSON: ", "error unmarshaling JSON: ",
		"while decoding JSON: ", "json: ", "yaml: ", "unmarshal errors:\n",
	} {
		s = strings.TrimPrefix(s, prefix)
	}
	s = strings.ReplaceAll(s, "\n", "; ")
	return fmt.Errorf("%s", strings.Join(strings.Fields(s), " "))
}
