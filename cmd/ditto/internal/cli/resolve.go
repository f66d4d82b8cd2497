package cli

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/vmproc"
	"ditto.vm/guest"
	"ditto.vm/guest/boot"
	"ditto.vm/images/kernel"
	"ditto.vm/images/uroot"
	"ditto.vm/vmm"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/kvm"
)

// resolve replaces names of images by paths, and makes what is not cached yet.
func (e *Env) resolve(ctx context.Context, cfg *config.Config, interactive bool) error {
	if strings.HasPrefix(cfg.Kernel, vmm.PayloadPrefix) {
		cfg.Initrd = config.InitrdNone
		return nil
	}
	progress := e.newProgress()
	defer progress.close()
	store := kernel.NewStore("", progress)
	k, err := store.Find(cfg.Kernel)
	if errors.Is(err, kernel.ErrNotCached) {
		if err := canRunLinux(); err != nil {
			return err
		}
		k, err = store.Ensure(ctx, cfg.Kernel)
	}
	if err != nil {
		return exit.New(exit.Kernel, err)
	}
	// A file named without a slash is found too.
	if cfg.Kernel, err = filepath.Abs(k.Image); err != nil {
		return exit.New(exit.Kernel, err)
	}
	if cfg.Initrd != config.InitrdURoot {
		return nil
	}
	image, err := e.uroot(ctx, uroot.Options{Kernel: k, Progress: progress}, func() error { return worthBuilding(k) })
	if err != nil {
		return kernelError(err)
	}
	cfg.Initrd = image.Path
	tellInit(cfg, interactive)
	return nil
}

// kernelError gives err the exit code of a bad kernel unless it has its own.
func kernelError(err error) error {
	if vmproc.Classify(err) != exit.Failure {
		return err
	}
	return exit.New(exit.Kernel, err)
}

// uroot returns the u-root image for o. If it is not cached and allowed does
// not object, it is built.
func (e *Env) uroot(ctx context.Context, o uroot.Options, allowed func() error) (*uroot.Image, error) {
	sources, err := guest.InitSource()
	if err != nil {
		return nil, err
	}
	o.Init = sources
	if image, ok := uroot.Cached(o); ok {
		return image, nil
	}
	if err := allowed(); err != nil {
		return nil, err
	}
	return uroot.Build(ctx, o)
}

// worthBuilding spares the user minutes of building an initramfs for a kernel
// that cannot be booted, or not here. What is cached costs nothing, and the
// machine's process looks again.
func worthBuilding(k kernel.Kernel) error {
	image, err := boot.OpenImage(k.Image)
	if err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	if err := errors.Join(boot.Check(image), image.Close()); err != nil {
		return err
	}
	return canRunLinux()
}

// canRunLinux spares the user minutes of fetching and building for a host that
// cannot run the result.
func canRunLinux() error {
	system, err := kvm.Open()
	if err != nil {
		return err
	}
	defer system.Close()
	linux, err := system.ProbeLinux()
	if err != nil {
		return err
	}
	if !linux.OK {
		return fmt.Errorf("%w: %s: ditto doctor tells more", vmm.ErrNoLinux, linux.Reason)
	}
	return nil
}

// tellInit puts on the kernel command line what ditto's init in the guest is to
// know: the command, and the terminal.
func tellInit(cfg *config.Config, interactive bool) {
	var words []string
	if len(cfg.Command) > 0 {
		command := base64.URLEncoding.EncodeToString([]byte(shellQuote(cfg.Command)))
		words = append(words, "quiet", "ditto.run64="+command)
		// The path of the initrd is known now; the command is in its words.
		cfg.Command = nil
	}
	if cols, rows, err := term.GetSize(int(os.Stdin.Fd())); interactive && err == nil && cols > 0 && rows > 0 {
		words = append(words, fmt.Sprintf("ditto.winsize=%dx%d", cols, rows))
	}
	if name := os.Getenv("TERM"); interactive && plainWord(name) {
		words = append(words, "ditto.term="+name)
	}
	if cfg.Name != "" && plainWord(cfg.Name) {
		words = append(words, "ditto.hostname="+cfg.Name)
	}
	cfg.Cmdline.Append = strings.TrimSpace(strings.Join(words, " ") + " " + cfg.Cmdline.Append)
}

// plainWord tells whether s needs no quoting anywhere.
func plainWord(s string) bool {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._"
	return s != "" && strings.Trim(s, plain) == ""
}

// shellQuote joins words so that a POSIX shell reads them as they are.
func shellQuote(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		if plainWord(w) {
			quoted[i] = w
			continue
		}
		quoted[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
	}
	return strings.Join(quoted, " ")
}

// completeKernel completes the names of cached kernels.
func (e *Env) completeKernel(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	kernels, err := kernel.NewStore("", nil).List()
	if err != nil {
		return nil, cobra.ShellCompDirectiveDefault
	}
	var out []string
	for _, k := range kernels {
		out = append(out, k.Version)
	}
	return out, cobra.ShellCompDirectiveDefault
}
