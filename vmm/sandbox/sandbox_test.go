package sandbox

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Environment of the child process that the tests start.
const (
	envCheck = "SANDBOX_TEST_CHECK" // name of the check to run
	envDir   = "SANDBOX_TEST_DIR"   // a folder prepared by the parent
	envOff   = "SANDBOX_TEST_OFF"   // set: run the check without a sandbox
)

// answer is what the child found.
type answer struct {
	Report Report
	Err    string
}

// TestMain lets the test binary be the process that is restricted.
func TestMain(m *testing.M) {
	name := os.Getenv(envCheck)
	if name == "" {
		os.Exit(m.Run())
	}
	check := allChecks()[name]
	run, err := check.prepare(os.Getenv(envDir))
	var a answer
	if err == nil && os.Getenv(envOff) == "" {
		dir := os.Getenv(envDir)
		a.Report, err = Apply(Policy{RunDir: filepath.Join(dir, "run", "vm"), RunRoot: filepath.Join(dir, "run"), ReadPaths: []string{filepath.Join(dir, "readable"), "/proc/self", "/absent"}})
	}
	if err != nil && os.Getenv(envOff) == "" {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if err == nil {
		err = run()
	}
	if err != nil {
		a.Err = err.Error()
	}
	_ = json.NewEncoder(os.Stdout).Encode(a)
	os.Exit(0)
}

// child runs a check in a process of its own. killed is the signal that ended
// it, if one did.
func child(t *testing.T, name string, off bool) (a answer, killed unix.Signal) {
	t.Helper()
	dir := t.TempDir()
	for _, folder := range []string{"run/vm", "run/other", "readable"} {
		if err := os.MkdirAll(filepath.Join(dir, folder), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"secret", "readable/file", "run/vm/lock", "run/other/lock", "disk"} {
		if err := os.WriteFile(filepath.Join(dir, file), bytes.Repeat([]byte("x"), 8192), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), envCheck+"="+name, envDir+"="+dir)
	if off {
		cmd.Env = append(cmd.Env, envOff+"=1")
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if status := exit.Sys().(interface{ Signaled() bool }); status.Signaled() {
			return a, exit.ProcessState.Sys().(interface{ Signal() unix.Signal }).Signal()
		}
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, &stderr)
	}
	if err := json.NewDecoder(bufio.NewReader(&stdout)).Decode(&a); err != nil {
		t.Fatalf("%v\n%s", err, &stderr)
	}
	return a, 0
}

// TestForbidden tries what a process that a guest took over would try. Each
// must work without the sandbox, or the test would prove nothing.
func TestForbidden(t *testing.T) {
	for name, c := range allChecks() {
		if c.allowed {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if a, killed := child(t, name, true); a.Err != "" || killed != 0 {
				t.Skipf("does not work on this machine even without the sandbox (%s %v): run the tests as root on a kernel that has it", a.Err, killed)
			}
			a, killed := child(t, name, false)
			if c.landlock && a.Report.Landlock == 0 && killed == 0 {
				t.Skip("the kernel has no landlock: boot it with landlock in lsm=")
			}
			switch {
			case c.kills && killed != unix.SIGSYS:
				t.Errorf("not killed by SIGSYS: %v, %q", killed, a.Err)
			case !c.kills && a.Err == "":
				t.Error("it worked")
			case !c.kills && !strings.Contains(a.Err, unix.EPERM.Error()) && !strings.Contains(a.Err, unix.EACCES.Error()) && !strings.Contains(a.Err, unix.ENOSYS.Error()):
				t.Errorf("failed for another reason: %s", a.Err)
			}
		})
	}
}

// TestAllowed does what a running machine does.
func TestAllowed(t *testing.T) {
	for name, c := range allChecks() {
		if !c.allowed {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if a, killed := child(t, name, true); a.Err != "" || killed != 0 {
				if c.kvm && os.Getenv("DITTO_REQUIRE_KVM") != "" {
					t.Fatalf("without the sandbox: %s %v", a.Err, killed)
				}
				t.Skipf("does not work on this machine even without the sandbox (%s %v)", a.Err, killed)
			}
			if a, killed := child(t, name, false); a.Err != "" || killed != 0 {
				t.Errorf("%s %v", a.Err, killed)
			}
		})
	}
}

// TestReport checks what Apply says about landlock.
func TestReport(t *testing.T) {
	a, _ := child(t, "getpid", false)
	if a.Err != "" || a.Report.Landlock != LandlockABI() || (a.Report.Landlock == 0) != (a.Report.Warning != "") {
		t.Errorf("%+v", a)
	}
}

func TestPoliciesAssemble(t *testing.T) {
	for i, p := range policies(Policy{IOUring: true}, 1) {
		instructions, err := p.Assemble()
		if err != nil || len(instructions) > 1000 {
			t.Errorf("filter %d: %d instructions, %v", i, len(instructions), err)
		}
	}
}

func TestPathRules(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	rules, err := pathRules(Policy{RunDir: dir, RunRoot: dir, ReadPaths: []string{dir, file, filepath.Join(dir, "absent")}})
	if err != nil || len(rules) != 4 {
		t.Errorf("%d rules, %v", len(rules), err)
	}
	if _, err := pathRules(Policy{ReadPaths: []string{"a\x00b"}}); err == nil {
		t.Error("a path with a NUL byte was accepted")
	}
}
