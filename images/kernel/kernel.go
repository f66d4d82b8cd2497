package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"ditto.vm/images/cache"
	"ditto.vm/images/debian"
)

// ErrNotCached says that no cached kernel fits a specification.
var ErrNotCached = errors.New("no such kernel is cached")

// Kernel is a kernel image and what belongs to it.
type Kernel struct {
	// Version is the release as uname -r prints it, or "" if the image does
	// not tell.
	Version string
	// Flavour is Generic, Cloud or RT, or "" for a kernel that is not Debian's.
	Flavour string
	// Image is the path of the bzImage or vmlinux.
	Image string
	// ModulesDir is the folder that would be /lib/modules/<Version>, or "".
	ModulesDir string
	// Config is the path of the build configuration, or "".
	Config string
}

// Store is the set of cached kernels.
type Store struct {
	root     string // cache root
	progress debian.Progress
}

// NewStore returns the store below the cache root dir ("" means [cache.Dir]).
// progress hears of downloads and may be nil.
func NewStore(dir string, progress debian.Progress) *Store {
	if dir == "" {
		dir = cache.Dir()
	}
	return &Store{root: dir, progress: progress}
}

// packageRE finds the release in the name of an unpacked kernel package.
var packageRE = regexp.MustCompile(`^linux-image-([0-9][^_]*-amd64)_`)

// List returns the cached kernels, newest first; of one version generic comes
// before cloud before rt.
func (s *Store) List() ([]Kernel, error) {
	entries, err := os.ReadDir(filepath.Join(s.root, "debian"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cached kernels: %w", err)
	}
	byRelease := map[string]Kernel{}
	for _, e := range entries {
		m := packageRE.FindStringSubmatch(e.Name())
		if m == nil {
			continue
		}
		// Later revisions of one release sort behind earlier ones well enough:
		// they share the ABI.
		if k, ok := fromPackage(filepath.Join(s.root, "debian", e.Name()), m[1]); ok {
			byRelease[k.Version] = k
		}
	}
	var ks []Kernel
	for _, k := range byRelease {
		ks = append(ks, k)
	}
	slices.SortFunc(ks, newestFirst)
	return ks, nil
}

func newestFirst(a, b Kernel) int {
	va, _ := splitRelease(a.Version)
	vb, _ := splitRelease(b.Version)
	if c := compareVersions(vb, va); c != 0 {
		return c
	}
	return flavourRank(a.Flavour) - flavourRank(b.Flavour)
}

func flavourRank(f string) int { return slices.Index([]string{Generic, Cloud, RT}, f) }

// fromPackage describes the kernel of an unpacked Debian package.
func fromPackage(dir, release string) (Kernel, bool) {
	_, flavour := splitRelease(release)
	k := Kernel{
		Version: release,
		Flavour: flavour,
		Image:   filepath.Join(dir, "boot", "vmlinuz-"+release),
		Config:  existing(filepath.Join(dir, "boot", "config-"+release)),
		ModulesDir: existing(
			filepath.Join(dir, "lib", "modules", release),
			filepath.Join(dir, "usr", "lib", "modules", release)),
	}
	return k, existing(k.Image) != ""
}

// Find returns the newest cached kernel that fits spec, or the kernel at a
// path. It contacts nobody. The error is [ErrNotCached] if spec is well formed
// but nothing fits.
func (s *Store) Find(spec string) (Kernel, error) {
	if strings.Contains(spec, "/") {
		return fromFile(spec)
	}
	if spec == "" {
		return s.newest()
	}
	sp, err := parseSpec(spec)
	if err != nil {
		if existing(spec) != "" {
			return fromFile(spec)
		}
		return Kernel{}, err
	}
	ks, err := s.List()
	if err != nil {
		return Kernel{}, err
	}
	for _, k := range ks {
		if sp.matches(k.Version) {
			return k, nil
		}
	}
	return Kernel{}, fmt.Errorf("kernel %s: %w", spec, ErrNotCached)
}

func (s *Store) newest() (Kernel, error) {
	ks, err := s.List()
	if err != nil {
		return Kernel{}, err
	}
	if len(ks) == 0 {
		return Kernel{}, ErrNotCached
	}
	return ks[0], nil
}

// DefaultSpec is what Ensure fetches when nothing was asked for and nothing is
// cached: small, and with virtio_pci and ext4 built in.
const DefaultSpec = "6.12-cloud"

// Ensure is Find, and fetches the newest fitting kernel of the Debian archive
// if none is cached. An empty spec is the newest cached kernel, or
// [DefaultSpec].
func (s *Store) Ensure(ctx context.Context, spec string) (Kernel, error) {
	k, err := s.Find(spec)
	if !errors.Is(err, ErrNotCached) {
		return k, err
	}
	if spec == "" {
		spec = DefaultSpec
	}
	return s.Fetch(ctx, spec)
}

// Fetch fetches the newest kernel of the Debian archive that fits spec, even
// if an older one is cached.
func (s *Store) Fetch(ctx context.Context, spec string) (Kernel, error) {
	sp, err := parseSpec(spec)
	if err != nil {
		return Kernel{}, err
	}
	archive, err := debian.Open(ctx, s.root, s.progress)
	if err != nil {
		return Kernel{}, fmt.Errorf("kernel %s: %w", spec, err)
	}
	names, err := archive.Names(ctx, "linux-image-"+sp.version)
	if err != nil {
		return Kernel{}, fmt.Errorf("kernel %s: %w", spec, err)
	}
	release := newestRelease(sp, names)
	if release == "" {
		return Kernel{}, fmt.Errorf("kernel %s: the Debian archive has no package linux-image-%s*", spec, sp.version)
	}
	dirs, err := archive.Ensure(ctx, "linux-image-"+release)
	if err != nil {
		return Kernel{}, err
	}
	k, ok := fromPackage(dirs[0], release)
	if !ok {
		return Kernel{}, fmt.Errorf("kernel %s: package linux-image-%s holds no image", spec, release)
	}
	return k, nil
}

// newestRelease picks the newest release that fits sp out of package names.
func newestRelease(sp spec, packages []string) string {
	var best string
	for _, name := range packages {
		release := strings.TrimPrefix(name, "linux-image-")
		if release == "" || !isDigit(release[0]) || !sp.matches(release) {
			continue
		}
		if best == "" || compareVersions(release, best) > 0 {
			best = release
		}
	}
	return best
}

// existing returns the first of paths that exists, or "".
func existing(paths ...string) string {
	for _, p := range paths {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	return ""
}
