package cli

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// Version says which ditto this is.
type Version struct {
	Version  string `json:"version"`
	Commit   string `json:"commit,omitempty"`
	Modified bool   `json:"modified,omitempty"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

// buildVersion completes the version that the linker was told, if any, with what
// the Go tool recorded in the program.
func buildVersion(linked string) Version {
	v := Version{Version: "devel", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	switch main := info.Main.Version; {
	case linked != "":
		v.Version = linked
	case main != "" && main != "(devel)":
		v.Version = main
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			v.Commit = s.Value
		case "vcs.modified":
			v.Modified = s.Value == "true"
		}
	}
	return v
}

// String returns the version in a few words.
func (v Version) String() string {
	s := v.Version
	if v.Commit != "" {
		s += " " + v.Commit[:min(12, len(v.Commit))]
	}
	if v.Modified {
		s += " (modified)"
	}
	return s
}

func (e *Env) versionCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		GroupID: groupHost,
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if asJSON {
				return e.printJSON(e.Version)
			}
			_, err := fmt.Fprintf(e.Stdout, "ditto %s, %s, %s\n", e.Version, e.Version.Go, e.Version.Platform)
			return err
		},
	}
	addJSON(cmd, &asJSON)
	return cmd
}
