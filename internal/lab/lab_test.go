package lab

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/lab/wire"
)

func TestOptions(t *testing.T) {
	o, err := Options{}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	if o.MemoryMiB != DefaultMemoryMiB || o.CPUs < 1 || o.DiskBytes != DefaultDiskBytes || o.Kernel != DefaultKernel || o.THP != DefaultTHP || o.Log == nil {
		t.Errorf("defaults: %+v", o)
	}
	for name, bad := range map[string]Options{
		"memory": {MemoryMiB: 100},
		"cpus":   {CPUs: 65},
		"disk":   {DiskBytes: 1},
		"disks":  {Disks: make([]string, maxDisks+1)},
		"thp":    {THP: "sometimes"},
	} {
		if _, err := bad.withDefaults(); err == nil {
			t.Errorf("bad %s was accepted", name)
		}
	}
}

func TestQEMUArgs(t *testing.T) {
	o, err := Options{MemoryMiB: 2048, CPUs: 3, Disks: []string{"/a,b"}, Append: "more", QEMUArgs: []string{"-S"}}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	args := qemuArgs(o, "/k", "/i", "/scratch", "/share", "/log", 2)
	for _, want := range [][]string{
		{"-smp", "3"}, {"-m", "2048"}, {"-kernel", "/k"}, {"-initrd", "/i"},
		{"-device", "virtio-blk-pci,drive=disk0,serial=disk0"},
		{"-chardev", "socket,id=run1,fd=4"},
		{"-device", "virtserialport,chardev=run1,name=" + wire.PortPrefix + "1"},
		{"-chardev", "socket,id=tick,fd=5"},
		{"-device", "virtserialport,chardev=tick,name=" + wire.TickPort},
	} {
		if i := slices.Index(args, want[1]); i < 1 || args[i-1] != want[0] {
			t.Errorf("%q is missing in %q", want, args)
		}
	}
	line := strings.Join(args, " ")
	for _, want := range []string{"file=/a,,b", "readonly=on", "tsc=reliable", " more ", "+svm,+npt"} {
		if !strings.Contains(line, want) {
			t.Errorf("%q is missing in %q", want, line)
		}
	}
	if args[len(args)-1] != "-S" {
		t.Error("the caller's arguments do not come last")
	}
}

func TestTempDirSweepsTheDead(t *testing.T) {
	parent := t.TempDir()
	mine, err := newTempDir(parent)
	if err != nil {
		t.Fatal(err)
	}
	dead := filepath.Join(parent, "run-dead")
	if err := os.MkdirAll(filepath.Join(dead, "share"), 0o755); err != nil {
		t.Fatal(err)
	}
	other, err := newTempDir(parent)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dead); !os.IsNotExist(err) {
		t.Errorf("the folder of a dead process is still there: %v", err)
	}
	if _, err := os.Stat(mine.path); err != nil {
		t.Errorf("the folder of a living lab was swept: %v", err)
	}
	for _, d := range []*tempDir{mine, other} {
		if err := d.remove(); err != nil {
			t.Error(err)
		}
	}
	left, err := filepath.Glob(filepath.Join(parent, "run-*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// stoppedLab is a Lab without a machine, to test what happens on this side.
func stoppedLab(t *testing.T) *Lab {
	t.Helper()
	tmp, err := newTempDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tmp.remove(); err != nil {
			t.Error(err)
		}
	})
	if err := os.Mkdir(tmp.join("share"), 0o755); err != nil {
		t.Fatal(err)
	}
	return &Lab{tmp: tmp, programs: map[string]identity{}}
}

func TestRebuiltProgramGetsFreshPath(t *testing.T) {
	l := stoppedLab(t)
	dir := t.TempDir()
	write := func(text string) {
		if err := os.WriteFile(filepath.Join(dir, "prog.new"), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "prog.new"), filepath.Join(dir, "prog")); err != nil {
			t.Fatal(err)
		}
	}
	fresh := func() string {
		path, err := l.freshProgram("./prog", dir)
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("one")
	for range 2 {
		if path := fresh(); path != "" {
			t.Errorf("an unchanged program runs as %s", path)
		}
	}
	write("two")
	path := fresh()
	host := filepath.Join(l.ShareDir(), strings.TrimPrefix(path, ShareDir))
	if text, err := os.ReadFile(host); err != nil || string(text) != "two" {
		t.Errorf("a rebuilt program runs as %q: %q, %v", path, text, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(host, &st); err != nil || st.Mode&0o111 == 0 {
		t.Errorf("the copy cannot be executed: %o, %v", st.Mode, err)
	}
	if path := fresh(); path == "" {
		t.Error("the lab would run the program as it first was")
	}
	if path, err := l.freshProgram("no-such-program", dir); err != nil || path != "" {
		t.Errorf("an unknown program: %q, %v", path, err)
	}
	if path, err := l.freshProgram(dir, "/"); err != nil || path != "" {
		t.Errorf("a folder: %q, %v", path, err)
	}
}

func TestCommand(t *testing.T) {
	l := stoppedLab(t)
	if _, err := l.command(&Cmd{}); err == nil {
		t.Error("no command was accepted")
	}
	env := append(make([]string, 0, 8), "A=1")
	c, err := l.command(&Cmd{Args: []string{"true"}, Env: env, Dir: "/x", Terminal: &Terminal{Rows: 24, Cols: 80}})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(c.Env, []string{"A=1", EnvInside + "=1"}) || c.Dir != "/x" || !c.Terminal || c.Rows != 24 || c.Cols != 80 {
		t.Errorf("command = %+v", c)
	}
	if len(env[:cap(env)]) > 1 && env[:2][1] != "" {
		t.Error("the caller's environment was written to")
	}
	if c, err = l.command(&Cmd{Args: []string{"true"}}); err != nil || c.Dir == "" || len(c.Env) < 2 {
		t.Errorf("defaults: %+v, %v", c, err)
	}
}
