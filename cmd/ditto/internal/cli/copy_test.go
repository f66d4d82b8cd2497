package cli

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCopySparse(t *testing.T) {
	dir := t.TempDir()
	from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
	f, err := os.Create(from)
	if err != nil {
		t.Fatal(err)
	}
	content := make([]byte, 16<<20)
	copy(content[5<<20:], "middle")
	if _, err := f.WriteAt(content[5<<20:5<<20+4096], 5<<20); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(int64(len(content))), f.Close()); err != nil {
		t.Fatal(err)
	}
	if err := copySparse(from, to); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(to)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("%d bytes differ, %v", len(got), err)
	}
	var st unix.Stat_t
	if err := unix.Stat(to, &st); err != nil || st.Blocks*512 > 1<<20 {
		t.Errorf("the copy takes %d bytes, %v", st.Blocks*512, err)
	}
	if err := copySparse(from, to); !errors.Is(err, os.ErrExist) {
		t.Errorf("an existing file: %v", err)
	}
	if err := copySparse(filepath.Join(dir, "absent"), filepath.Join(dir, "x")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an absent file: %v", err)
	}
}
