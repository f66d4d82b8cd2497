package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/adrg/xdg"
	"github.com/spf13/cobra"

	"ditto.vm/images/chain"
	"ditto.vm/migration/snapshot"
)

func (e *Env) snapshotRemoveCommand() *cobra.Command {
	var folders []string
	cmd := &cobra.Command{
		Use:   "rm DIR...",
		Short: "Remove snapshots",
		Long: `Remove snapshots. One that is the parent of another is not removed: others are looked
for in the folder around it, and below it, and in those that --search names.

The disks that a snapshot froze stay. For each it is said which other snapshots in
these folders need it, and which overlays beside it, in these folders, and of restored
machines. If there are none, and no machine uses it, it may be removed, or written
again after 'chmod u+w'.`,
		Example: `  ditto snapshot rm /var/snap/web1 /var/snap/web2
  ditto snapshot rm /var/snap/web1 --search /srv/more-snapshots`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeSnapshots,
		RunE: func(_ *cobra.Command, args []string) error {
			doomed := make([]snapshot.Entry, len(args))
			for i, dir := range args {
				path, err := filepath.Abs(dir)
				if err != nil {
					return err
				}
				doomed[i].Path = path
				if all, err := snapshot.List(path); err == nil && len(all) == 1 && all[0].Path == path {
					doomed[i] = all[0]
				}
			}
			// Children before their parents.
			slices.SortStableFunc(doomed, func(a, b snapshot.Entry) int { return depthOf(b) - depthOf(a) })
			for _, s := range doomed {
				if err := e.removeSnapshot(s, folders); err != nil {
					return snapshotError(err)
				}
			}
			return nil
		},
	}
	cmd.Flags().StringArrayVar(&folders, "search", nil, "look for snapshots and overlays in this `FOLDER` too; repeat for more")
	_ = cmd.MarkFlagDirname("search")
	return cmd
}

func depthOf(s snapshot.Entry) int {
	if s.Manifest == nil {
		return 0
	}
	return s.Manifest.Depth()
}

// removeSnapshot removes a snapshot and says what stays.
func (e *Env) removeSnapshot(s snapshot.Entry, folders []string) error {
	err := snapshot.Remove(s.Path, folders...)
	if errors.Is(err, snapshot.ErrDependents) {
		return fmt.Errorf("%w: remove those first", err)
	}
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(e.Stdout, "%s: removed\n", s.Path); err != nil || s.Manifest == nil {
		return err
	}
	around, err := snapshotsIn(append(folders, filepath.Dir(s.Path)))
	if err != nil {
		return err
	}
	for _, l := range s.Manifest.Layers {
		path, _ := snapshot.FindLayer(s.Path, l)
		info, err := os.Stat(path)
		if err != nil || !info.Mode().IsRegular() || info.Mode()&0o222 != 0 {
			continue // not frozen, or not there
		}
		users := overlaysOf(info, slices.Concat([]string{filepath.Dir(path)}, folders, overlayFolders()))
		for _, other := range around {
			if other.Manifest != nil && slices.ContainsFunc(other.Manifest.Layers, func(o snapshot.Layer) bool { return o.ID == l.ID }) {
				users = append(users, other.Path)
			}
		}
		words := "nothing that was found needs it"
		if len(users) > 0 {
			words = "needed by " + strings.Join(users, ", ")
		}
		if _, err := fmt.Fprintf(e.Stdout, "%s stays: %s\n", path, words); err != nil {
			return err
		}
	}
	return nil
}

// snapshotsIn lists the snapshots in folders, each once.
func snapshotsIn(folders []string) ([]snapshot.Entry, error) {
	var all []snapshot.Entry
	for _, folder := range folders {
		folder, err := filepath.Abs(folder)
		if err != nil {
			return nil, err
		}
		found, err := snapshot.List(folder)
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}
	slices.SortFunc(all, func(a, b snapshot.Entry) int { return strings.Compare(a.Path, b.Path) })
	return slices.CompactFunc(all, func(a, b snapshot.Entry) bool { return a.Path == b.Path }), nil
}

// overlaysOf lists the images in folders that are stacked on one.
func overlaysOf(image os.FileInfo, folders []string) []string {
	var found []string
	for _, folder := range folders {
		entries, err := os.ReadDir(folder)
		if err != nil {
			continue // it says what was found
		}
		for _, entry := range entries {
			if path := filepath.Join(folder, entry.Name()); entry.Type().IsRegular() && isOn(path, image) {
				found = append(found, path)
			}
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// overlayFolders are those that restored machines have their overlays in, unless
// they were given others.
func overlayFolders() []string {
	found, err := filepath.Glob(filepath.Join(xdg.DataHome, "ditto", "*"))
	if err != nil {
		return nil // the folder's name looks like a pattern
	}
	return found
}

// isOn reports whether the file at path is an image that is stacked on another.
func isOn(path string, image os.FileInfo) bool {
	below, _, err := chain.Backing(path)
	if err != nil || below == "" {
		return false
	}
	info, err := os.Stat(below)
	return err == nil && os.SameFile(info, image)
}
