package snapshot

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/zeebo/blake3"

	"ditto.vm/images/layer"
	"ditto.vm/memory"
	"ditto.vm/migration/state"
)

// Format is the version of the format that is written, and the newest that is
// read.
const Format = 1

// Bounds of what is read.
const (
	// MaxChain bounds the snapshots from one to its oldest ancestor, both
	// included.
	MaxChain = 64
	// MaxSection and MaxSections bound the state of devices: 64 MiB, 1024.
	MaxSection  = 64 << 20
	MaxSections = 1024
	// MaxManifest bounds the manifest: 16 MiB.
	MaxManifest = 16 << 20
	maxLayers   = 4096 // that a name can number
)

// Compression is how the bytes of pages are stored.
type Compression string

// The compressions.
const (
	// None stores pages as they are, at multiples of a page: they can be mapped.
	None Compression = "none"
	// Zstd stores rows of pages as frames (RFC 8878), each readable by itself.
	Zstd Compression = "zstd"
)

// Manifest says what a snapshot is of.
type Manifest struct {
	Format int `json:"format"`
	// Ditto is the version of the program that wrote it.
	Ditto   string    `json:"ditto"`
	Created time.Time `json:"created"`
	// Config is what the VM was made of, as the writer was given it.
	Config json.RawMessage `json:"config,omitempty"`
	Memory Memory          `json:"memory"`
	// Layers are those that pages are named by, numbered by their place.
	Layers      []Layer     `json:"layers"`
	Parent      *Parent     `json:"parent,omitempty"`
	Compression Compression `json:"compression"`
	Holds       Holds       `json:"holds"`
	PageMap     File        `json:"pagemap"`
	// Pages has the digest of the digests of its pages, which the page map
	// lists.
	Pages    File          `json:"pages"`
	Sections []SectionFile `json:"sections"`
}

// Memory is guest memory: its size, and where it lies.
type Memory struct {
	Size    uint64  `json:"size"` // bytes
	Regions []Range `json:"regions"`
}

// Range is a range of guest-physical addresses.
type Range struct {
	Start uint64 `json:"start"`
	Size  uint64 `json:"size"` // bytes
}

// Layer is a disk layer that pages are named by. It does not change any more.
type Layer struct {
	ID layer.ID `json:"id"`
	// Path is where it was, a hint: absolute, or relative to the snapshot.
	Path string `json:"path"`
	// Size is what a guest sees of it, in bytes.
	Size int64 `json:"size"`
	// Format is how the file stores it: raw, qcow2.
	Format string `json:"format"`
	// Stamp is the file's, by which it is known to be unchanged without
	// reading it. Zero for none.
	Stamp Stamp `json:"stamp,omitzero"`
}

// Stamp is a [layer.Stamp].
type Stamp struct {
	Size   int64  `json:"size"`
	Mtime  int64  `json:"mtime"`
	Ctime  int64  `json:"ctime"`
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
}

// Parent is the snapshot that an incremental one adds to.
type Parent struct {
	ID ID `json:"id"`
	// Path is where it was, a hint: absolute, or relative to the snapshot.
	Path string `json:"path"`
	// Depth is how many ancestors the snapshot has, the parent included.
	Depth int `json:"depth"`
}

// File is a file of the snapshot.
type File struct {
	Size   uint64 `json:"size"` // bytes
	Digest Digest `json:"digest"`
}

// SectionFile is a file below sections.
type SectionFile struct {
	Name    string `json:"name"`
	Version uint32 `json:"version"`
	File
}

// Section is the state of a part of the VM, in that part's own encoding. Its
// name is made of lower-case letters, digits, ".", "_" and "-", 64 at the most,
// and begins with a letter.
type Section = state.Section

// Holds is how much of memory the snapshot holds as what, in bytes.
type Holds struct {
	Zero      uint64 `json:"zero"`
	Blocks    uint64 `json:"blocks"`    // of layers
	Duplicate uint64 `json:"duplicate"` // of other pages
	Parent    uint64 `json:"parent"`
	Unique    uint64 `json:"unique"` // stored in pages, before compression
}

// regions returns memory's ranges.
func (m *Manifest) regions() []memory.Range {
	ranges := make([]memory.Range, len(m.Memory.Regions))
	for i, r := range m.Memory.Regions {
		ranges[i] = memory.Range{Start: memory.GPA(r.Start), Size: r.Size}
	}
	return ranges
}

// Depth returns how many ancestors the snapshot has.
func (m *Manifest) Depth() int {
	if m.Parent == nil {
		return 0
	}
	return m.Parent.Depth
}

// The end of a manifest holds its identity, over all bytes before.
const (
	sealLabel  = "ditto snapshot manifest 1\x00"
	sealBefore = ",\n  \"id\": \""
	sealAfter  = "\"\n}\n"
	sealSize   = len(sealBefore) + 2*len(ID{}) + len(sealAfter)
)

// seal returns the identity of a manifest whose bytes before its end are b.
func seal(b []byte) ID {
	h := blake3.New()
	_, _ = h.WriteString(sealLabel)
	_, _ = h.Write(b)
	var id ID
	copy(id[:], h.Sum(nil))
	return id
}

// encode returns the bytes of manifest.json, and the identity they give.
func (m *Manifest) encode() ([]byte, ID, error) {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, ID{}, fmt.Errorf("manifest: %w", err)
	}
	b = bytes.TrimSuffix(b, []byte("\n}"))
	id := seal(b)
	b = append(b, sealBefore+id.String()+sealAfter...)
	if len(b) > MaxManifest {
		return nil, ID{}, fmt.Errorf("manifest: %d bytes are more than %d", len(b), MaxManifest)
	}
	return b, id, nil
}

// ParseManifest decodes the bytes of a manifest, and checks everything that it
// says against itself. It returns the identity of the snapshot, too.
func ParseManifest(b []byte) (*Manifest, ID, error) {
	if len(b) > MaxManifest {
		return nil, ID{}, formatError("manifest: %d bytes are more than %d", len(b), MaxManifest)
	}
	var version struct {
		Format int `json:"format"`
	}
	// Of a newer version nothing else may be as it is now.
	if err := json.Unmarshal(b, &version); err != nil {
		return nil, ID{}, formatError("manifest: %v", err)
	}
	if version.Format > Format {
		return nil, ID{}, fmt.Errorf("%w: format %d, this program reads up to %d", ErrVersion, version.Format, Format)
	}
	if len(b) < sealSize {
		return nil, ID{}, formatError("manifest: %d bytes are too few", len(b))
	}
	body := b[:len(b)-sealSize]
	id := seal(body)
	if string(b[len(body):]) != sealBefore+id.String()+sealAfter {
		return nil, ID{}, formatError("the manifest was altered")
	}
	var m Manifest
	d := json.NewDecoder(io.MultiReader(bytes.NewReader(body), bytes.NewReader([]byte("\n}"))))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil {
		return nil, ID{}, formatError("manifest: %v", err)
	}
	if d.More() {
		return nil, ID{}, formatError("manifest: something follows it")
	}
	if err := m.check(); err != nil {
		return nil, ID{}, formatError("manifest: %v", err)
	}
	return &m, id, nil
}

// check checks what does not need other files.
func (m *Manifest) check() error {
	if m.Format != Format {
		return fmt.Errorf("format %d", m.Format)
	}
	want, err := memory.Layout(m.Memory.Size)
	if err != nil {
		return err
	}
	if !slices.Equal(m.regions(), want) {
		return fmt.Errorf("memory of %d bytes does not lie in %v", m.Memory.Size, m.Memory.Regions)
	}
	if m.Compression != None && m.Compression != Zstd {
		return fmt.Errorf("compression %q", m.Compression)
	}
	if len(m.Layers) > maxLayers {
		return fmt.Errorf("%d layers are more than %d", len(m.Layers), maxLayers)
	}
	for i := range m.Layers {
		if err := m.Layers[i].check(); err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
	}
	if p := m.Parent; p != nil && (p.Depth < 1 || p.Depth >= MaxChain || p.Path == "") {
		return fmt.Errorf("parent %q, the %d. of a chain of at most %d", p.Path, p.Depth, MaxChain)
	}
	return m.checkSections()
}

func (m *Manifest) checkSections() error {
	if len(m.Sections) > MaxSections {
		return fmt.Errorf("%d sections are more than %d", len(m.Sections), MaxSections)
	}
	seen := make(map[string]bool)
	for _, s := range m.Sections {
		if err := checkSection(s.Name, s.Size); err != nil {
			return err
		}
		if seen[s.Name] {
			return fmt.Errorf("two sections %s", s.Name)
		}
		seen[s.Name] = true
	}
	return nil
}

// checkSection checks a section's name, which becomes a file's, and its size.
func checkSection(name string, size uint64) error {
	ok := len(name) > 0 && len(name) <= 64 && name[0] >= 'a' && name[0] <= 'z'
	for _, c := range []byte(name) {
		ok = ok && (c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-')
	}
	if !ok {
		return fmt.Errorf("section name %q", name)
	}
	if size > MaxSection {
		return fmt.Errorf("section %s: %d bytes are more than %d", name, size, MaxSection)
	}
	return nil
}

func (l *Layer) check() error {
	switch {
	case l.ID.Kind() == layer.Unknown:
		return fmt.Errorf("identity %s", l.ID)
	case l.Size < 0 || uint64(l.Size)/memory.PageSize >= 1<<44:
		return fmt.Errorf("%d bytes", l.Size)
	case l.Path == "":
		return fmt.Errorf("no path")
	case l.Format == "" || len(l.Format) > 32:
		return fmt.Errorf("format %q", l.Format)
	}
	return nil
}
