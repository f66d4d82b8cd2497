package qcow2

import (
	"bytes"
	"encoding/binary"
)

// SetBackingFile makes the header of the image in s name another backing image,
// "" for none, and its format. Nothing else changes. Nobody may have the image
// open.
func SetBackingFile(s Storage, name, format string) error {
	length, err := s.Length()
	if err != nil {
		return unreadable(err)
	}
	old := make([]byte, min(length, maxHeaderBytes))
	if err := s.ReadBuffered(old, 0); err != nil {
		return unreadable(err)
	}
	h, err := parseHeader(old, length)
	if err != nil {
		return err
	}
	if name != "" && format != "raw" && format != "qcow2" {
		return refusal("say raw or qcow2", "cannot have a backing file of format %q", format)
	}
	old = old[:min(int64(len(old)), h.ClusterSize())]
	b, err := h.withBacking(old, name, format)
	if err != nil {
		return err
	}
	// What is equal at both ends is left alone, so that most changes are within
	// one sector, which a power cut does not tear.
	first := 0
	for first < len(b) && b[first] == old[first] {
		first++
	}
	last := len(b)
	for last > first && b[last-1] == old[last-1] {
		last--
	}
	if err := s.WriteBuffered(b[first:last], int64(first)); err != nil {
		return err
	}
	return s.Flush()
}

// withBacking returns the header's cluster b with another backing image. The
// table of feature names, which nobody needs, gives way to a long name.
func (h *Header) withBacking(b []byte, name, format string) ([]byte, error) {
	be := binary.BigEndian
	extensions, feature := splitExtensions(b, h.Version)
	for {
		out := append(make([]byte, 0, len(b)), b[:headerLength(b, h.Version)]...)
		out = append(out, bytes.Join(extensions, nil)...)
		if name != "" {
			out = append(out, extension(extensionBackingFormat, []byte(format))...)
		}
		out = be.AppendUint64(out, extensionEnd)
		be.PutUint64(out[offBackingOffset:], 0)
		be.PutUint32(out[offBackingSize:], uint32(len(name)))
		if name != "" {
			be.PutUint64(out[offBackingOffset:], uint64(len(out)))
			out = append(out, name...)
		}
		switch {
		case len(name) <= maxBackingName && len(out) <= len(b):
			return append(out, make([]byte, len(b)-len(out))...), nil
		case feature < 0:
			return nil, refusal("use a shorter path, or one relative to the image", "cannot hold the name of its backing file, %d bytes", len(name))
		}
		extensions, feature = append(extensions[:feature:feature], extensions[feature+1:]...), -1
	}
}

// headerLength is where the extensions begin, in a header that was checked.
func headerLength(b []byte, version int) int {
	if version < 3 {
		return headerSizeV2
	}
	return int(binary.BigEndian.Uint32(b[offHeaderLength:]))
}

// extension encodes one.
func extension(kind uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	b = append(b, data...)
	return append(b, make([]byte, -len(data)&7)...)
}

// splitExtensions returns the extensions of a header that was checked, but the
// backing format and the end, and the place of the table of feature names among
// them or -1.
func splitExtensions(b []byte, version int) (all [][]byte, feature int) {
	be := binary.BigEndian
	end := len(b)
	if at := be.Uint64(b[offBackingOffset:]); at != 0 && be.Uint32(b[offBackingSize:]) != 0 {
		end = int(at)
	}
	feature = -1
	for at := headerLength(b, version); at+8 <= end; {
		kind, n := be.Uint32(b[at:]), int(be.Uint32(b[at+4:]))
		if kind == extensionEnd {
			break
		}
		if kind == extensionFeatureNames {
			feature = len(all)
		}
		if kind != extensionBackingFormat {
			all = append(all, extension(kind, b[at+8:][:n]))
		}
		at += 8 + (n+7)&^7
	}
	return all, feature
}
