package chain

import (
	"errors"

	"ditto.vm/images/disk"
	"ditto.vm/images/qcow2"
)

// Backing returns what the qcow2 image at path is stacked on, "" for nothing,
// and its format. The image may be in use: no lock is taken.
func Backing(path string) (below string, format Format, err error) {
	file, err := disk.Open(path, disk.Options{ReadOnly: true, Container: true, Unlocked: true})
	if err != nil {
		return "", Probe, err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	h, err := qcow2.ReadHeader(file)
	if err != nil {
		return "", Probe, named(err, path)
	}
	if h.BackingFile == "" {
		return "", Probe, nil
	}
	format = Format(h.BackingFormat)
	below, err = (&Layer{file: file}).resolve(h.BackingFile, format)
	return below, format, err
}
