package guest

import (
	"embed"
	"io/fs"
)

// The sources of guest/init. A main package cannot be imported, and images may
// not import guest, so whoever builds an image hands them over.
//
//go:embed init/*.go
var initSource embed.FS

// InitSource returns the Go sources of the in-guest init program (package
// guest/init), for images/uroot to compile on whatever machine ditto runs.
func InitSource() (fs.FS, error) {
	return fs.Sub(initSource, "init")
}
