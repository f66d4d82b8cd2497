package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"github.com/landlock-lsm/go-landlock/landlock"
	llsys "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// Policy is what the process may still do with paths, and which families of
// system calls it uses. Descriptors that are open already need nothing.
type Policy struct {
	// RunDir is the machine's folder in the run directory: its files may be
	// listed and removed, and the folder itself. Empty if there is none.
	RunDir string
	// RunRoot is the folder that RunDir is in: empty folders may be removed.
	RunRoot string
	// TakeOver allows renaming files within RunDir: those of a machine that is
	// another process's still.
	TakeOver bool
	// ReadPaths may be read, files and whole folders.
	ReadPaths []string
	// IOUring allows submitting to rings that were made before.
	IOUring bool
}

// Report says what was applied.
type Report struct {
	// Landlock is the ABI version in use, 0 if the kernel has none.
	Landlock int
	// Warning tells what is missing, and the cure. Empty if nothing is.
	Warning string
}

// Apply drops the rights of the process. After an error the process is in an
// undefined, partly restricted state and must not run a guest.
func Apply(p Policy) (Report, error) {
	// The time zone is read from a file when it is first needed, which would
	// be too late.
	_ = time.Now().Format("MST")

	if err := noCoreFiles(); err != nil {
		return Report{}, fmt.Errorf("sandbox: %w", err)
	}
	report, err := applyLandlock(p)
	if err != nil {
		return report, fmt.Errorf("sandbox: landlock: %w", err)
	}
	if err := dropCapabilities(); err != nil {
		return report, fmt.Errorf("sandbox: capabilities: %w", err)
	}
	if err := applySeccomp(p); err != nil {
		return report, fmt.Errorf("sandbox: %w", err)
	}
	return report, nil
}

// noCoreFiles forbids core files, for good: the hard limit goes down too.
func noCoreFiles() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("RLIMIT_CORE: %w", err)
	}
	return nil
}

// LandlockABI returns the version of landlock that the kernel offers, 0 for
// none.
func LandlockABI() int {
	abi, err := llsys.LandlockGetABIVersion()
	if err != nil {
		return 0
	}
	return abi
}

// applyLandlock sets no_new_privs and restricts paths, TCP, abstract sockets
// and signals, as far as the kernel can.
func applyLandlock(p Policy) (Report, error) {
	report := Report{Landlock: LandlockABI()}
	if report.Landlock == 0 {
		report.Warning = "the kernel lacks landlock and paths stay reachable: boot it with landlock in lsm="
		return report, nil
	}
	rules, err := pathRules(p)
	if err != nil {
		return report, err
	}
	// go-landlock may set no_new_privs on this thread and then restrict all.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return report, landlock.V11.BestEffort().Restrict(rules...)
}

// pathRules turns the policy into landlock's.
func pathRules(p Policy) ([]landlock.Rule, error) {
	var rules []landlock.Rule
	if p.RunDir != "" {
		rights := landlock.AccessFSSet(llsys.AccessFSReadDir | llsys.AccessFSRemoveFile)
		if p.TakeOver {
			rights |= llsys.AccessFSMakeReg | llsys.AccessFSMakeSock
		}
		rules = append(rules, landlock.PathAccess(rights, p.RunDir))
	}
	if p.RunRoot != "" {
		rules = append(rules, landlock.PathAccess(llsys.AccessFSRemoveDir, p.RunRoot))
	}
	for _, path := range p.ReadPaths {
		st, err := os.Stat(path)
		switch {
		case errors.Is(err, os.ErrNotExist):
			continue
		case err != nil:
			return nil, err
		case st.IsDir():
			rules = append(rules, landlock.RODirs(path))
		default:
			rules = append(rules, landlock.ROFiles(path))
		}
	}
	return rules, nil
}
