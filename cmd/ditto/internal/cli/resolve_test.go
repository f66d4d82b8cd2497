package cli

import (
	"encoding/base64"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/vmproc"
	"ditto.vm/guest/boot"
	"ditto.vm/vmm/config"
)

func TestShellQuote(t *testing.T) {
	for _, test := range []struct {
		words []string
		want  string
	}{
		{[]string{"ls", "-l", "/x"}, "ls -l '/x'"},
		{[]string{"sh", "-c", "echo $HOME; exit 5"}, "sh -c 'echo $HOME; exit 5'"},
		{[]string{"echo", "it's", "", "a\nb"}, `echo 'it'\''s' '' 'a` + "\nb'"},
	} {
		if got := shellQuote(test.words); got != test.want {
			t.Errorf("%q: %s, want %s", test.words, got, test.want)
		}
	}
}

func TestTellInit(t *testing.T) {
	cfg := config.Default()
	cfg.Name, cfg.Command, cfg.Cmdline.Append = "web", []string{"echo", "a b"}, "mine"
	tellInit(&cfg, false)
	words := strings.Fields(cfg.Cmdline.Append)
	if len(words) != 4 || words[0] != "quiet" || words[2] != "ditto.hostname=web" || words[3] != "mine" {
		t.Fatalf("%q", words)
	}
	command, err := base64.URLEncoding.DecodeString(strings.TrimPrefix(words[1], "ditto.run64="))
	if err != nil || string(command) != "echo 'a b'" {
		t.Errorf("%q, %v", command, err)
	}
	if cfg.Command != nil {
		t.Error("the command is still in the configuration, which no longer fits the initrd")
	}
	if err := cfg.Validate(); err != nil {
		t.Error(err)
	}

	plain := config.Default()
	tellInit(&plain, false)
	if plain.Cmdline.Append != "" {
		t.Errorf("%q", plain.Cmdline.Append)
	}
}

// TestKernelIsCheckedBeforeBuilding has an empty cache: whoever builds first
// takes minutes, or fails for want of something else.
func TestKernelIsCheckedBeforeBuilding(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	cfg := config.Default()
	cfg.Kernel = filepath.Join(t.TempDir(), "junk")
	if err := os.WriteFile(cfg.Kernel, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	e := &Env{Stdout: io.Discard, Stderr: io.Discard}
	err := e.resolve(t.Context(), &cfg, false)
	if !errors.Is(err, boot.ErrNotKernel) || vmproc.Classify(err) != exit.Kernel {
		t.Errorf("a file of zeros: %v", err)
	}
}
