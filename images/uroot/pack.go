package uroot

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"
)

// assemble packs an image into the folder tmp.
func (o Options) assemble(tmp, commands, initPath string) error {
	const what = "pack the initramfs"
	o.report(what, 0)
	mods, err := collectModules(o.Kernel, o.Modules)
	if err != nil {
		return err
	}
	own, err := o.ownRecords(mods, initPath)
	if err != nil {
		return err
	}
	f, err := os.Open(commands)
	if err != nil {
		return err
	}
	defer f.Close()
	base, err := readRecords(f)
	if err != nil {
		return fmt.Errorf("%s: %w", commands, err)
	}
	records := merge(base, own)
	size, err := writeFile(filepath.Join(tmp, imageFile), records)
	if err != nil {
		return err
	}
	img := Image{SizeBytes: size, Release: o.release()}
	for _, m := range mods {
		img.Modules = append(img.Modules, m.name)
	}
	for _, r := range records {
		if strings.HasPrefix(r.Name, "bbin/") && r.Name != "bbin/bb" {
			img.Commands++
		}
	}
	b, err := json.MarshalIndent(img, "", "  ")
	if err != nil {
		return err
	}
	o.report(what, 1)
	return os.WriteFile(filepath.Join(tmp, manifestFile), append(b, '\n'), 0o644)
}

// ownRecords are what ditto adds to u-root's archive.
func (o Options) ownRecords(mods []packedModule, initPath string) ([]cpio.Record, error) {
	program, err := os.ReadFile(initPath)
	if err != nil {
		return nil, err
	}
	rs := []cpio.Record{cpio.StaticFile("init", string(program), 0o755)}
	for _, name := range initLinks() {
		rs = append(rs, cpio.Symlink("sbin/"+name, "/init"))
	}
	if o.Kernel.ModulesDir != "" {
		dir := path.Join("lib/modules", o.release())
		rs = append(rs,
			cpio.StaticFile(dir+"/modules.dep", modulesDep(mods), 0o644),
			cpio.StaticFile(dir+"/modules.alias", modulesAlias(mods), 0o644),
			cpio.StaticFile(dir+"/ditto.load", loadList(mods, o.Modules), 0o644))
		for _, m := range mods {
			rs = append(rs, cpio.StaticFile(path.Join(dir, m.file), string(m.data), 0o644))
		}
	}
	if o.Run != "" {
		rs = append(rs, cpio.StaticFile("etc/ditto/run", o.Run+"\n", 0o644))
	}
	for _, name := range sortedKeys(o.Files) {
		fi, err := os.Stat(o.Files[name])
		if err != nil {
			return nil, err
		}
		if !fi.Mode().IsRegular() {
			return nil, fmt.Errorf("%s is not a regular file", o.Files[name])
		}
		b, err := os.ReadFile(o.Files[name])
		if err != nil {
			return nil, err
		}
		rs = append(rs, cpio.StaticFile(name, string(b), uint64(fi.Mode().Perm())))
	}
	return rs, nil
}

func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }

func readRecords(r io.ReaderAt) ([]cpio.Record, error) {
	var rs []cpio.Record
	reader := cpio.Newc.Reader(r)
	for {
		rec, err := reader.ReadRecord()
		if errors.Is(err, io.EOF) {
			return rs, nil
		}
		if err != nil {
			return nil, err
		}
		rs = append(rs, rec)
	}
}

// merge lays own over base: what own names is left out of base, and folders
// that nobody made are made before they are needed.
func merge(base, own []cpio.Record) []cpio.Record {
	mine := map[string]bool{}
	for _, r := range own {
		mine[r.Name] = true
	}
	made := map[string]bool{".": true}
	var out []cpio.Record
	add := func(r cpio.Record) {
		var parents []string
		for dir := path.Dir(r.Name); !made[dir]; dir = path.Dir(dir) {
			made[dir] = true
			parents = append(parents, dir)
		}
		for _, dir := range slices.Backward(parents) {
			out = append(out, cpio.Directory(dir, 0o755))
		}
		if made[r.Name] {
			return // a folder that a file inside it brought earlier
		}
		made[r.Name] = r.Mode&cpio.S_IFMT == cpio.S_IFDIR
		out = append(out, r)
	}
	for _, r := range base {
		if !mine[r.Name] && r.Name != cpio.Trailer {
			add(r)
		}
	}
	for _, r := range own {
		add(r)
	}
	return out
}

func writeFile(name string, records []cpio.Record) (size int64, err error) {
	f, err := os.Create(name)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buf := bufio.NewWriterSize(f, 1<<20)
	size, err = writeArchive(buf, records)
	return size, errors.Join(err, buf.Flush())
}

const (
	pageSize   = 4096
	newcHeader = 110
	maxName    = 4096 // PATH_MAX: the kernel skips records with longer names
)

// writeArchive writes records and the trailer, and returns the size. The data
// of files of a page or more starts at a page boundary.
func writeArchive(w io.Writer, records []cpio.Record) (int64, error) {
	c := &counter{w: w}
	out := cpio.Newc.Writer(c)
	fillers := 0
	for _, r := range records {
		if r.Mode&cpio.S_IFMT == cpio.S_IFREG && r.FileSize >= pageSize {
			for nameLen(c.n, r.Name) > maxName {
				fillers++
				if err := out.WriteRecord(filler(fillers)); err != nil {
					return c.n, err
				}
			}
			r.Name += strings.Repeat("\x00", nameLen(c.n, r.Name)-1-len(r.Name))
		}
		if err := out.WriteRecord(r); err != nil {
			return c.n, err
		}
	}
	if err := cpio.WriteTrailer(out); err != nil {
		return c.n, err
	}
	return c.n, nil
}

// nameLen is how long a name, with its NULs, must be so that the data of a
// record at pos is aligned.
func nameLen(pos int64, name string) int {
	end := pos + newcHeader + int64(len(name)) + 1
	aligned := (end + pageSize - 1) &^ (pageSize - 1)
	return int(aligned - pos - newcHeader)
}

// filler is a record without effect, for gaps that a name cannot span. The
// number of its NULs makes it unlike the others: the writer drops records whose
// name it has seen.
func filler(n int) cpio.Record {
	return cpio.Directory("."+strings.Repeat("\x00", 4*n), 0o755)
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
