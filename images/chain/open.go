package chain

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"ditto.vm/images/disk"
	"ditto.vm/images/qcow2"
)

// Format is the format of an image file.
type Format string

// The formats. Probe finds out.
const (
	Probe Format = ""
	Raw   Format = "raw"
	Qcow2 Format = "qcow2"
)

// MaxDepth is how many layers a chain may have. Each holds a file open and
// costs a look-up where the ones above hold nothing.
const MaxDepth = 128

// Options say how to open a chain.
type Options struct {
	// ReadOnly opens the top for reading only, as the others always are.
	ReadOnly bool
	Cache    disk.Cache
	// Format of the top.
	Format Format
	// AnyLength takes a raw image of any length, as a backing file may have.
	// Zeros fill its last block.
	AnyLength bool
	// Unlocked takes no lock and is read-only: what is read may change at any
	// time, and may be neither what was nor what is.
	Unlocked bool
}

// Open opens and locks an image and everything below it. What a user can get
// wrong is a [*disk.Error].
func Open(path string, o Options) (*Chain, error) {
	o.ReadOnly = o.ReadOnly || o.Unlocked
	top, err := openLayer(path, o)
	if err != nil {
		return nil, err
	}
	c := &Chain{options: o, probed: o.Format == Probe}
	c.newest.Store(top)
	if err := c.openBelow(top); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// openBelow opens what the last layer is stacked on, down to the bottom.
func (c *Chain) openBelow(last *Layer) error {
	for depth := 1; ; depth++ {
		name, format := last.backing()
		if name == "" {
			return nil
		}
		path, err := last.resolve(name, format)
		if err != nil {
			return err
		}
		if depth >= MaxDepth {
			return &disk.Error{Path: last.Path(), Reason: fmt.Sprintf("is on more than %d layers", MaxDepth), Cure: "merge some with 'ditto image commit'"}
		}
		below, err := openLayer(path, Options{ReadOnly: true, Cache: c.options.Cache, Format: format, AnyLength: true, Unlocked: c.options.Unlocked})
		if err != nil {
			return fmt.Errorf("below %s: %w", last.Path(), err)
		}
		for l := c.top(); l != nil; l = l.below {
			if l.same(below) {
				_ = below.close() // it was opened for reading
				return &disk.Error{Path: path, Reason: "is below itself", Cure: "stack one of the images on another with 'ditto image rebase --unsafe'"}
			}
		}
		last.attach(below)
		last = below
	}
}

// openLayer opens one image. With Probe its content says what it is.
func openLayer(path string, o Options) (*Layer, error) {
	format := o.Format
	if format == Probe {
		found, err := probe(path)
		if err != nil {
			return nil, err
		}
		format = found
	}
	switch format {
	case Raw:
		file, err := disk.Open(path, disk.Options{ReadOnly: o.ReadOnly, Cache: o.Cache, Raw: o.Format == Raw, Container: o.AnyLength, Unlocked: o.Unlocked})
		if err != nil {
			return nil, err
		}
		return &Layer{file: file}, nil
	case Qcow2:
		return openQcow2(path, o)
	}
	return nil, &disk.Error{Path: path, Reason: fmt.Sprintf("is said to have the format %q, which is not supported", format), Cure: "use raw or qcow2"}
}

func openQcow2(path string, o Options) (*Layer, error) {
	file, err := disk.Open(path, disk.Options{ReadOnly: o.ReadOnly, Cache: o.Cache, Container: true, Unlocked: o.Unlocked})
	if err != nil {
		return nil, err
	}
	return readQcow2(file, o)
}

// readQcow2 makes a layer of an open file, which it closes if it cannot.
func readQcow2(file *disk.Raw, o Options) (*Layer, error) {
	image, err := qcow2.Open(file, qcow2.Options{ReadOnly: o.ReadOnly})
	if err == nil && o.Cache == disk.CacheNone {
		if h := image.Header(); h.ClusterSize() < pageSize {
			err = &disk.Error{Reason: fmt.Sprintf("has clusters of %d bytes, too small for cache mode none", h.ClusterSize()), Cure: "use cache mode writeback"}
		}
	}
	if err != nil {
		return nil, errors.Join(named(err, file.Path()), file.Close())
	}
	return &Layer{file: file, image: image}, nil
}

const pageSize = 4096

// named fills in the path that format code does not know.
func named(err error, path string) error {
	var e *disk.Error
	if errors.As(err, &e) && e.Path == "" {
		e.Path = path
	}
	return err
}

// probe tells by its beginning what an image is. Formats that are neither raw
// nor qcow2 are refused when it is opened.
func probe(path string) (Format, error) {
	file, err := disk.Open(path, disk.Options{ReadOnly: true, Container: true, Unlocked: true})
	if err != nil {
		return Probe, err
	}
	var magic [4]byte
	err = errors.Join(file.ReadBuffered(magic[:], 0), file.Close())
	if err != nil {
		return Probe, &disk.Error{Path: path, Err: err, Reason: "cannot be read: " + err.Error(), Cure: "check the file system and the device"}
	}
	if string(magic[:]) == qcow2.Magic {
		return Qcow2, nil
	}
	return Raw, nil
}

// backing returns the name of the image below and its format, "" for none.
func (l *Layer) backing() (name string, format Format) {
	if l.image == nil {
		return "", Probe
	}
	h := l.image.Header()
	return h.BackingFile, Format(h.BackingFormat)
}

// protocol reports whether QEMU would take a name for something else than a
// path.
func protocol(name string) bool {
	scheme, _, ok := strings.Cut(name, ":")
	return ok && !strings.Contains(scheme, "/")
}

// resolve turns the name of a backing file into a path: relative to the image
// that names it.
func (l *Layer) resolve(name string, format Format) (string, error) {
	name = strings.TrimPrefix(name, "file:")
	if protocol(name) {
		return "", &disk.Error{
			Path: l.Path(), Reason: fmt.Sprintf("has the backing file %q, which is not a path", name),
			Cure: "give it one with 'ditto image rebase --unsafe'",
		}
	}
	path := name
	if !filepath.IsAbs(name) {
		path = filepath.Join(filepath.Dir(l.Path()), name)
	}
	if format == Probe {
		return "", &disk.Error{
			Path: l.Path(), Reason: fmt.Sprintf("does not say which format its backing file %q has", name),
			Cure: fmt.Sprintf("say it with 'ditto image rebase --unsafe --format raw %s %s', or qcow2", l.Path(), path),
		}
	}
	return path, nil
}
