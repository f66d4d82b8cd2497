package uroot

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"ditto.vm/images/cache"
)

// Image is a finished initramfs in the cache. It is never changed; another
// build of other inputs has another path.
type Image struct {
	Path      string   `json:"path"`
	SizeBytes int64    `json:"sizeBytes"`
	Release   string   `json:"release,omitempty"` // of the kernel its modules suit
	Modules   []string `json:"modules,omitempty"` // packed, in an order to load them
	Commands  int      `json:"commands"`          // programs in /bbin
}

const (
	imageFile    = "initramfs.cpio"
	manifestFile = "manifest.json"
	commandsFile = "commands.cpio"
	initFile     = "init"
)

// Build returns the image that o describes, from the cache or newly built.
// Of several processes that build the same image one works, the others wait.
func Build(ctx context.Context, o Options) (*Image, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	imageKey, err := o.imageKey()
	if err != nil {
		return nil, fmt.Errorf("u-root image: %w", err)
	}
	dst := o.path(imageKey)
	err = cache.MakeDir(ctx, dst, func(tmp string) error {
		commands, err := o.buildCommands(ctx)
		if err != nil {
			return err
		}
		initPath, err := o.buildInit(ctx)
		if err != nil {
			return err
		}
		return o.assemble(tmp, commands, initPath)
	})
	if err != nil {
		return nil, fmt.Errorf("u-root image: %w", err)
	}
	return readImage(dst)
}

// Cached returns the image that o describes if it was built before.
func Cached(o Options) (*Image, bool) {
	if o.check() != nil {
		return nil, false
	}
	imageKey, err := o.imageKey()
	if err != nil {
		return nil, false
	}
	img, err := readImage(o.path(imageKey))
	return img, err == nil
}

func (o Options) path(elem ...string) string {
	return filepath.Join(append([]string{o.cacheDir(), "uroot"}, elem...)...)
}

func (o Options) report(what string, fraction float64) {
	if o.Progress != nil {
		o.Progress.Report(what, fraction)
	}
}

func readImage(dir string) (*Image, error) {
	b, err := os.ReadFile(filepath.Join(dir, manifestFile))
	if err != nil {
		return nil, fmt.Errorf("u-root image: %w", err)
	}
	var img Image
	if err := json.Unmarshal(b, &img); err != nil {
		return nil, fmt.Errorf("u-root image: %s: %w", manifestFile, err)
	}
	img.Path = filepath.Join(dir, imageFile)
	return &img, nil
}

// initFlags are the flags of go build for process 1.
func initFlags() []string {
	return []string{"-trimpath", "-ldflags=-s -w -buildid="}
}

// buildInit compiles process 1 and returns its path.
func (o Options) buildInit(ctx context.Context) (string, error) {
	initKey, err := o.initKey()
	if err != nil {
		return "", err
	}
	dst := o.path("init-" + initKey)
	err = cache.MakeDir(ctx, dst, func(tmp string) error {
		const what = "compile the guest's init"
		o.report(what, 0)
		g, cleanup, err := o.newModule()
		if err != nil {
			return err
		}
		defer cleanup()
		args := append([]string{"build", "-o", filepath.Join(tmp, initFile)}, initFlags()...)
		if err := g.run(ctx, append(args, "./init")...); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		o.report(what, 1)
		return nil
	})
	return filepath.Join(dst, initFile), err
}

// buildCommands compiles u-root's commands and returns the path of an archive
// with them.
func (o Options) buildCommands(ctx context.Context) (string, error) {
	dst := o.path("commands-" + o.commandsKey())
	err := cache.MakeDir(ctx, dst, func(tmp string) error {
		const what = "compile u-root's commands"
		o.report(what, 0)
		g, cleanup, err := o.newModule()
		if err != nil {
			return err
		}
		defer cleanup()
		builder := filepath.Join(g.dir, "u-root")
		if err := g.run(ctx, "build", "-o", builder, "github.com/u-root/u-root"); err != nil {
			return fmt.Errorf("compile u-root's builder: %w", err)
		}
		o.report(what, 0.2)
		commands, extra := splitVersions(o.commands())
		for _, pkg := range extra {
			if err := g.run(ctx, "get", pkg); err != nil {
				return fmt.Errorf("command %s: %w", pkg, err)
			}
		}
		args := []string{
			"-o", filepath.Join(tmp, commandsFile), "-tmp-dir", filepath.Join(g.dir, "busybox"),
			"-initcmd=", "-uinitcmd=", "-defaultsh=gosh",
		}
		for _, tag := range o.tags() {
			args = append(args, "-go-build-tags", tag)
		}
		if err := g.exec(ctx, builder, append(args, commands...)...); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		o.report(what, 1)
		return nil
	})
	return filepath.Join(dst, commandsFile), err
}

// splitVersions takes "@version" off the commands and lists what go must get.
func splitVersions(commands []string) (plain, get []string) {
	for _, c := range commands {
		if pkg, _, ok := strings.Cut(c, "@"); ok {
			get = append(get, c)
			c = pkg
		}
		plain = append(plain, c)
	}
	return plain, get
}

// newModule writes the module to compile in to a temporary folder of the cache.
func (o Options) newModule() (g goTool, cleanup func(), err error) {
	path, err := findGo(o.GoCommand)
	if err != nil {
		return goTool{}, nil, err
	}
	if err := os.MkdirAll(o.path(), 0o755); err != nil {
		return goTool{}, nil, err
	}
	dir, err := os.MkdirTemp(o.path(), ".build-")
	if err != nil {
		return goTool{}, nil, err
	}
	cleanup = func() { _ = os.RemoveAll(dir) }
	if err := o.writeModule(dir); err != nil {
		cleanup()
		return goTool{}, nil, err
	}
	return goTool{path: path, dir: dir}, cleanup, nil
}

func (o Options) writeModule(dir string) error {
	files := map[string][]byte{
		"go.mod": goMod, "go.sum": goSum,
		// u-root looks for this file in the parent folders too; an empty one
		// here keeps the user's out.
		".mkuimage.yaml": []byte("configs: {}\n"),
	}
	names, err := initFiles(o.Init)
	if err != nil {
		return err
	}
	for _, name := range names {
		if files["init/"+name], err = fs.ReadFile(o.Init, name); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "init"), 0o755); err != nil {
		return err
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return err
		}
	}
	return nil
}
