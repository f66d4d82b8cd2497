package debian

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
)

// configText is the private apt configuration. It is read after the system's
// (so that proxies keep working) and moves everything apt would write, and
// drops the hooks that act on the system.
func configText(dir string) string {
	return fmt.Sprintf(`// Written by ditto; not the system's configuration.
Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts "%[1]s/sources";
Dir::State::Lists "%[1]s/lists";
Dir::Cache "%[1]s";
Dir::Cache::archives "archives";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
APT::Sandbox::User "";
APT::Get::AllowUnauthenticated "false";
APT::Architecture "amd64";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons-small::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons::DefaultEnabled "false";
Acquire::IndexTargets::deb::CNF::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
#clear APT::Architectures;
APT::Architectures { "amd64"; };
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
`, dir)
}

// sourcesText is the deb822 source of the private configuration.
func sourcesText(m mirrors) string {
	const stanza = "Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n"
	s := fmt.Sprintf(stanza, m.main, codename+" "+codename+"-updates "+codename+"-backports", keyring)
	if m.security != "" {
		s += "\n" + fmt.Sprintf(stanza, m.security, codename+"-security", keyring)
	}
	return s
}

// writeConfig writes the private configuration.
//
// Preconditions: the archive's lock is held.
func (a *Archive) writeConfig(m mirrors) error {
	for _, dir := range []string{"sources", "lists/partial", "archives/partial"} {
		if err := os.MkdirAll(a.path(dir), 0o755); err != nil {
			return fmt.Errorf("apt configuration: %w", err)
		}
	}
	if err := a.writeIfNew("apt.conf", configText(a.path())); err != nil {
		return err
	}
	return a.writeIfNew("sources/debian.sources", sourcesText(m))
}

// writeIfNew leaves a file alone that already says what it should: an apt of
// another process may be reading it.
func (a *Archive) writeIfNew(name, text string) error {
	path := a.path(name)
	if old, err := os.ReadFile(path); err == nil && string(old) == text {
		return nil
	}
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		return fmt.Errorf("apt configuration: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("apt configuration: %w", err)
	}
	return nil
}

// aptGet runs apt-get with the private configuration in dir, reports its
// progress as the step called what, and returns its standard output.
func (a *Archive) aptGet(ctx context.Context, dir, what string, args ...string) ([]byte, error) {
	status, statusW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer func() { _ = status.Close() }()
	args = append([]string{"-c", a.ConfigPath(), "-q", "-y", "-o", "APT::Status-Fd=3"}, args...)
	cmd := exec.CommandContext(ctx, "apt-get", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	cmd.ExtraFiles = []*os.File{statusW}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr

	if err := cmd.Start(); err != nil {
		_ = statusW.Close()
		return nil, fmt.Errorf("apt-get: %w", err)
	}
	_ = statusW.Close()
	var wg sync.WaitGroup
	wg.Go(func() { a.follow(what, status) })
	err = cmd.Wait()
	wg.Wait()
	if err != nil {
		return nil, fmt.Errorf("apt-get %s: %w: %s", args[6], err, aptError(stderr.String()))
	}
	a.report(what, 1)
	return stdout.Bytes(), nil
}

// follow turns apt's status lines ("dlstatus:1:23.5:Retrieving ...") into
// reports until r ends.
func (a *Archive) follow(what string, r io.Reader) {
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		f := strings.SplitN(sc.Text(), ":", 4)
		if len(f) < 3 || f[0] != "dlstatus" {
			continue
		}
		if pct, err := strconv.ParseFloat(f[2], 64); err == nil && pct >= 0 && pct < 100 {
			a.report(what, pct/100)
		}
	}
	_, _ = io.Copy(io.Discard, r)
}

// aptError picks the first line that states an error, which is the cause; the
// last one usually only says that something failed.
func aptError(stderr string) string {
	for line := range strings.Lines(stderr) {
		if msg, ok := strings.CutPrefix(line, "E: "); ok {
			return strings.TrimSpace(msg)
		}
	}
	return lastLine(stderr)
}
