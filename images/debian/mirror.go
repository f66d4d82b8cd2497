package debian

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// EnvMirror names the environment variable that overrides the mirror found in
// apt's configuration. Its value is the URI of a "debian" archive root.
const EnvMirror = "DITTO_DEBIAN_MIRROR"

// codename is the Debian release whose packages ditto uses. It does not follow
// the machine's release: kernels are booted, not installed.
const codename = "bookworm"

// ErrNoMirror says that apt's configuration names no Debian mirror.
var ErrNoMirror = errors.New("apt names no Debian mirror: add a Debian source to /etc/apt/sources.list.d or set " + EnvMirror)

// mirrors are the archive roots that the private configuration uses.
type mirrors struct {
	main     string // bookworm, -updates, -backports
	security string // bookworm-security; "" when apt names none
}

// indexFormat is what findMirrors asks of apt-get indextargets, one target a line.
const indexFormat = "$(ORIGIN)|$(RELEASE)|$(REPO_URI)|$(SIGNED_BY)"

// findMirrors derives the mirrors from the machine's apt configuration.
func findMirrors(ctx context.Context) (mirrors, error) {
	if uri := os.Getenv(EnvMirror); uri != "" {
		return mirrors{main: uri}, nil
	}
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", indexFormat).Output()
	if err != nil {
		return mirrors{}, fmt.Errorf("apt-get indextargets: %w", err)
	}
	return parseTargets(string(out))
}

// parseTargets picks the Debian archives out of lines in [indexFormat]. A
// source is Debian's when its downloaded release file says so, or, before the
// first apt-get update, when it is signed by Debian's archive key or carries a
// Debian 12 suite.
func parseTargets(targets string) (mirrors, error) {
	var m mirrors
	sc := bufio.NewScanner(strings.NewReader(targets))
	for sc.Scan() {
		f := strings.Split(sc.Text(), "|")
		if len(f) != 4 {
			continue
		}
		origin, release, uri, signedBy := f[0], f[1], f[2], f[3]
		if uri == "" || (origin != "" && origin != "Debian") {
			continue
		}
		if origin == "" && !strings.Contains(signedBy, "debian-archive") && !strings.HasPrefix(release, codename) {
			continue
		}
		switch {
		case strings.HasSuffix(release, "-security"):
			if m.security == "" && release == codename+"-security" {
				m.security = uri
			}
		case m.main == "":
			m.main = uri
		}
	}
	if m.main == "" {
		return mirrors{}, ErrNoMirror
	}
	return m, nil
}
