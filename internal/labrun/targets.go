package labrun

import "time"

// LabRun is the pattern of the tests that run in the lab unless something else
// is said: by convention they are called TestLab... or TestLinux...
const LabRun = "^Test(Lab|Linux)"

// LabPackage is a package that has tests for the lab (see internal/labtest).
type LabPackage struct {
	Path string
	Run  string // pattern of test names; "" means LabRun
}

// LabPackages returns the lab batch of `make test`.
func LabPackages() []LabPackage {
	return []LabPackage{
		{Path: "./internal/labtest"},
		{Path: "./vmm/kvm", Run: "."}, // every ioctl, on a KVM with nested paging
		{Path: "./vmm"},
	}
}

// Where tells on which machine a target runs.
type Where string

// The machines.
const (
	Native Where = "native" // this one
	InLab  Where = "lab"    // the emulated host
)

// Proof is one long-running proof: tests of one package, run with full counts.
type Proof struct {
	ID      string // of docs/proofs.md
	Package string
	Run     string // pattern of test names
	Where   Where
	Timeout time.Duration
}

// Proofs returns the proofs of `make prove`, in the order in which they run.
// Every fuzz target of the tree is run besides.
func Proofs() []Proof {
	return nil
}

// FuzzTime is how long `make prove` runs each fuzz target.
const FuzzTime = 5 * time.Minute
