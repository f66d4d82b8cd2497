package archive

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"ditto.vm/images/chain"
	"ditto.vm/images/layer"
	"ditto.vm/migration/snapshot"
)

// Format is the version of archives that is written, and the newest that is
// read.
const Format = 1

// ErrFormat is wrapped when the bytes are not an archive, truncated or altered.
// Of a newer version of archives the error wraps [snapshot.ErrVersion].
var ErrFormat = errors.New("not an intact archive of a snapshot")

// formatError says what is wrong with an archive.
func formatError(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrFormat, fmt.Sprintf(format, args...))
}

// Bounds of what is read.
const (
	maxIndex  = 4 << 20
	maxImages = 8192
	// maxFile bounds each file, so that sizes can be added up.
	maxFile = 1 << 46
	maxName = 200
)

// indexName is the first member.
const indexName = "ditto-archive.json"

// index is the first member of an archive: what follows.
type index struct {
	Format int `json:"format"`
	// Ditto is the version of the program that wrote it.
	Ditto string `json:"ditto"`
	// Snapshots are the one that was exported, its parent, and so on.
	Snapshots []entry `json:"snapshots"`
	// Images are the files of layers. What an image is stacked on comes before
	// it.
	Images []image `json:"images"`
}

// entry is a snapshot.
type entry struct {
	// Name of its folder.
	Name string      `json:"name"`
	ID   snapshot.ID `json:"id"`
	// WorkingSet is the size of that file in bytes, 0 for none.
	WorkingSet int64 `json:"workingset,omitempty"`
}

// image is a file that layers are made of.
type image struct {
	// Name of the file.
	Name string `json:"name"`
	// IDs are the layers that it is, with what it is stacked on. An image that is
	// only below others has none.
	IDs    []layer.ID   `json:"ids,omitempty"`
	Format chain.Format `json:"format"`
	// Size of the file in bytes.
	Size int64 `json:"size"`
	// Below is the image that this one is stacked on, "" for none.
	Below string `json:"below,omitempty"`
}

// name is how the image at place n of the list is called.
func (i *image) name(n int) string {
	if len(i.IDs) > 0 {
		return snapshot.LayerName(i.IDs[0], i.Format)
	}
	return fmt.Sprintf("below-%d.%s", n, i.Format)
}

// validName reports whether a folder may be called so.
func validName(name string) bool {
	return name != "" && len(name) <= maxName && utf8.ValidString(name) && filepath.IsLocal(name) &&
		!strings.HasPrefix(name, ".") && !strings.ContainsFunc(name, func(r rune) bool { return r == '/' || !unicode.IsPrint(r) }) &&
		name != snapshot.LayersName && name != indexName
}

func (x *index) encode() ([]byte, error) {
	b, err := json.MarshalIndent(x, "", "  ")
	if err == nil && len(b) > maxIndex {
		err = fmt.Errorf("its list of %d bytes is longer than %d", len(b), maxIndex)
	}
	return append(b, '\n'), err
}

// decodeIndex checks everything that the first member says against itself.
func decodeIndex(b []byte) (*index, error) {
	var version struct {
		Format int `json:"format"`
	}
	// Of a newer version nothing else may be as it is now.
	if err := json.Unmarshal(b, &version); err != nil {
		return nil, formatError("%s: %v", indexName, err)
	}
	if version.Format > Format {
		return nil, fmt.Errorf("%w: the archive has format %d, this program reads up to %d", snapshot.ErrVersion, version.Format, Format)
	}
	var x index
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&x); err != nil {
		return nil, formatError("%s: %v", indexName, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, formatError("%s: something follows it", indexName)
	}
	if err := x.check(); err != nil {
		return nil, formatError("%s: %v", indexName, err)
	}
	return &x, nil
}

func (x *index) check() error {
	if x.Format != Format {
		return fmt.Errorf("format %d", x.Format)
	}
	if n := len(x.Snapshots); n == 0 || n > snapshot.MaxChain {
		return fmt.Errorf("%d snapshots, 1 to %d can be", n, snapshot.MaxChain)
	}
	names := make(map[string]bool)
	for _, s := range x.Snapshots {
		if !validName(s.Name) || names[s.Name] || s.WorkingSet < 0 || s.WorkingSet > maxFile {
			return fmt.Errorf("snapshot %q with a working set of %d bytes", s.Name, s.WorkingSet)
		}
		names[s.Name] = true
	}
	if len(x.Images) > maxImages {
		return fmt.Errorf("%d images are more than %d", len(x.Images), maxImages)
	}
	var ids []layer.ID
	for n, i := range x.Images {
		if err := i.check(n, x.Images[:n]); err != nil {
			return fmt.Errorf("image %q: %w", i.Name, err)
		}
		ids = append(ids, i.IDs...)
	}
	slices.SortFunc(ids, func(a, b layer.ID) int { return bytes.Compare(a[:], b[:]) })
	if len(slices.Compact(ids)) != len(ids) {
		return errors.New("two images are one layer")
	}
	return nil
}

// check checks the image at place n, whose predecessors are before.
func (i *image) check(n int, before []image) error {
	for _, id := range i.IDs {
		if id.Kind() == layer.Unknown {
			return fmt.Errorf("identity %s", id)
		}
	}
	switch {
	case i.Format != chain.Raw && i.Format != chain.Qcow2:
		return fmt.Errorf("format %q", i.Format)
	case i.Name != i.name(n):
		return fmt.Errorf("it should be called %s", i.name(n))
	case i.Size < 0 || i.Size > maxFile:
		return fmt.Errorf("%d bytes", i.Size)
	case i.Below == "":
		return nil
	case i.Format != chain.Qcow2:
		return errors.New("a raw image is stacked on nothing")
	case !slices.ContainsFunc(before, func(b image) bool { return b.Name == i.Below }):
		return fmt.Errorf("%q, which it is stacked on, does not come before it", i.Below)
	}
	return nil
}
