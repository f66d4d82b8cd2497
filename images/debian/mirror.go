package debian

import (
	"cmp"
	"context"
	"errors"
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
var ErrNoMirror = errors.New("apt names no Debian mirror: run apt-get update, add a Debian source to " +
	"/etc/apt/sources.list.d, or set " + EnvMirror)

// mirrors are the archive roots that the private configuration uses.
type mirrors struct {
	main     string // bookworm, -updates, -backports
	security string // bookworm-security; "" when apt names none
}

// indexFormat is what findMirrors asks of apt-get indextargets, one target a
// line. A variable that apt does not know stays as it is written here.
const indexFormat = "$(ORIGIN)|$(RELEASE)|$(COMPONENT)|$(REPO_URI)"

// findMirrors derives the mirrors from the machine's apt configuration.
func findMirrors(ctx context.Context) (mirrors, error) {
	if uri := os.Getenv(EnvMirror); uri != "" {
		return mirrors{main: uri}, nil
	}
	// With its release file apt knows a source's origin, but it then lists only
	// sources that were downloaded, which on a fresh machine are none.
	var m mirrors
	for _, extra := range []string{"--release-info", "--no-release-info"} {
		out, err := exec.CommandContext(ctx, "apt-get", "indextargets", extra,
			"--format", indexFormat, "Identifier: Packages").Output()
		if err != nil {
			return mirrors{}, commandError("apt-get indextargets", err)
		}
		if m, err = parseTargets(string(out)); err == nil {
			return m, nil
		}
	}
	return m, ErrNoMirror
}

// parseTargets picks the Debian archives out of lines in [indexFormat]. A
// source is Debian's when its release file says so, or, while that is not
// known, when it has the component main of a Debian 12 suite.
func parseTargets(targets string) (mirrors, error) {
	var m mirrors
	for line := range strings.Lines(targets) {
		f := strings.Split(strings.TrimSpace(line), "|")
		if len(f) != 4 || f[3] == "" {
			continue
		}
		origin, release, component, uri := f[0], f[1], f[2], f[3]
		if strings.HasPrefix(origin, "$") {
			origin = ""
		}
		ours := origin == "Debian" || origin == "" && component == "main" && strings.HasPrefix(release, codename)
		switch {
		case !ours:
		case release == codename+"-security":
			m.security = cmp.Or(m.security, uri)
		case !strings.HasSuffix(release, "-security"):
			m.main = cmp.Or(m.main, uri)
		}
	}
	if m.main == "" {
		return mirrors{}, ErrNoMirror
	}
	return m, nil
}
