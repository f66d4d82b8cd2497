package remotesave

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/lend"
)

// operation is the name that both ends know.
const operation = "snapshot"

// What the machine asks for.
const (
	askCreate      = "create"       // a new file of the snapshot, lent for reading and writing
	askCommit      = "commit"       // give the snapshot its name
	askAbort       = "abort"        // remove the snapshot
	askOverlay     = "overlay"      // an empty overlay on a disk, lent once or twice
	askDropOverlay = "drop-overlay" // remove it
	askOpen        = "open"         // a file of an older snapshot, lent for reading
)

// maxPath is PATH_MAX less the NUL.
const maxPath = 4095

// Kinds are the errors that a save is decided by.
func Kinds() lend.Kinds {
	return lend.Kinds{
		"busy":          snapshot.ErrBusy,
		"exists":        snapshot.ErrExists,
		"no-space":      snapshot.ErrNoSpace,
		"parent":        snapshot.ErrParent,
		"format":        snapshot.ErrFormat,
		"version":       snapshot.ErrVersion,
		"layer":         snapshot.ErrLayer,
		"layer-written": snapshot.ErrLayerWritten,
		"frozen":        chain.ErrFrozen,
		"locked":        disk.ErrLocked,
		"state":         api.ErrWrongState,
		"ending":        lend.ErrEnding,
		"gone":          lend.ErrGone,
	}
}

// options are vmm.SaveOptions on their way.
type options struct {
	Parent      string               `json:"parent,omitempty"`
	ParentPath  string               `json:"parent_path,omitempty"`
	Compression snapshot.Compression `json:"compression"`
	Stop        bool                 `json:"stop,omitempty"`
	Paused      bool                 `json:"paused,omitempty"`
}

func (o options) check() error {
	switch {
	case o.Compression != snapshot.None && o.Compression != snapshot.Zstd:
		return fmt.Errorf("compression %q: use none or zstd", o.Compression)
	case (o.Parent == "") != (o.ParentPath == ""):
		return errors.New("a parent needs its folder and how it is referred to")
	case o.Parent != "" && checkPath(o.Parent) != nil || len(o.ParentPath) > maxPath || strings.ContainsRune(o.ParentPath, 0):
		return fmt.Errorf("the parent %.100q is not a path", o.Parent)
	}
	return nil
}

// checkPath accepts what names a file wherever one is.
func checkPath(path string) error {
	if !filepath.IsAbs(path) || len(path) > maxPath || strings.ContainsRune(path, 0) {
		return fmt.Errorf("%w: the path %.100q", lend.ErrProtocol, path)
	}
	return nil
}

// createArgs go with askCreate.
type createArgs struct {
	Name string `json:"name"`
}

// overlayArgs are a savehost.OverlayRequest on their way.
type overlayArgs struct {
	Disk   int          `json:"disk"`
	Below  string       `json:"below"`
	Format chain.Format `json:"format"`
	Size   int64        `json:"size"`
	Direct bool         `json:"direct,omitempty"`
	// FreezeOnly makes no overlay.
	FreezeOnly bool `json:"freeze_only,omitempty"`
}

func (a overlayArgs) check() error {
	if err := checkPath(a.Below); err != nil {
		return err
	}
	if a.Disk < 0 || a.Disk >= config.MaxDevices || a.Size <= 0 || a.Format != chain.Raw && a.Format != chain.Qcow2 {
		return fmt.Errorf("%w: an overlay for disk %d, of %d bytes on an image of format %.20q", lend.ErrProtocol, a.Disk, a.Size, a.Format)
	}
	return nil
}

// overlayReply says what was made.
type overlayReply struct {
	Path string `json:"path"`
}

// dropArgs go with askDropOverlay.
type dropArgs struct {
	Disk int `json:"disk"`
}

// openArgs go with askOpen.
type openArgs struct {
	Dir  string `json:"dir"`
	Name string `json:"name"`
}

// checkFileName accepts the names of a snapshot's files, and with written only
// those that a save makes.
func checkFileName(name string, written bool) error {
	switch name {
	case "manifest.json", "pagemap", "pages":
		return nil
	case snapshot.WorkingSet:
		if !written {
			return nil
		}
	}
	section, ok := strings.CutPrefix(name, "sections/")
	if !ok || section == "" || len(section) > 64 || section[0] < 'a' || section[0] > 'z' {
		return fmt.Errorf("%w: %.100q is not the name of a snapshot's file", lend.ErrProtocol, name)
	}
	for _, c := range []byte(section) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '.' && c != '_' && c != '-' {
			return fmt.Errorf("%w: %.100q is not the name of a snapshot's file", lend.ErrProtocol, name)
		}
	}
	return nil
}
