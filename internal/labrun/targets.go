package labrun

import "time"

// LabRun is the pattern of the tests that run in the lab.
const LabRun = "^TestLab"

// LabPackages returns the packages that have tests for the lab (see
// internal/labtest). A package without a TestLab... test must not be listed.
func LabPackages() []string {
	return []string{
		"./internal/labtest",
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
