package labrun

import (
	"path/filepath"
	"time"
)

// Patterns of test names, by convention.
const (
	// LabRun finds the tests that run in the lab.
	LabRun = "^Test(Lab|Linux)"
	// BootRun finds the tests that boot labs themselves.
	BootRun = "^TestBoot"
)

// LabPackage is a package that has tests for the lab (see internal/labtest).
type LabPackage struct {
	Path string
	Run  string // pattern of test names; "" means LabRun
	// Boots says that the tests boot labs themselves: they run on this machine,
	// while no other lab is running, and not at all where none is needed.
	Boots bool
	// Whole runs all its tests at once: they are many and short.
	Whole bool
}

// LabPackages returns the lab batch of `make test`. Those that boot labs come
// first.
func LabPackages() []LabPackage {
	return []LabPackage{
		{Path: "./internal/lab", Run: BootRun, Boots: true},
		{Path: "./internal/e2e/storage", Run: BootRun, Boots: true}, // power cuts, of guests that run and that are saved
		{Path: "./internal/labtest"},
		{Path: "./vmm/kvm", Run: ".", Whole: true}, // every ioctl, on a KVM with nested paging
		{Path: "./internal/trackertest"},           // trackers and frames under nested page tables
		{Path: "./internal/namestest"},             // names under nested page tables
		{Path: "./internal/e2e"},                   // Debian, directly and by kexec; networks; saves, restores and clones
		{Path: "./vmm"},
		{Path: "./internal/e2e/storage"},
	}
}

// Select returns the entries of the list for the given packages. One that is
// not listed is taken with its lab tests.
func Select(paths []string) []LabPackage {
	var list []LabPackage
	for _, path := range paths {
		found := false
		for _, lp := range LabPackages() {
			if filepath.Clean(lp.Path) == filepath.Clean(path) {
				list, found = append(list, lp), true
			}
		}
		if !found {
			list = append(list, LabPackage{Path: path})
		}
	}
	return list
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
	return []Proof{
		{ID: "boots-native", Package: "./vmm", Run: "^TestBootsLeaveNothing$", Where: Native, Timeout: 10 * time.Minute},
		{ID: "trackers", Package: "./internal/trackertest", Run: "^TestTrackers$", Where: Native, Timeout: 10 * time.Minute},
		{ID: "trackers-npt", Package: "./internal/trackertest", Run: "^TestLabTrackers$", Where: InLab, Timeout: 60 * time.Minute},
		{ID: "frames", Package: "./internal/trackertest", Run: "^TestFrames$", Where: Native, Timeout: 10 * time.Minute},
		{ID: "frames-npt", Package: "./internal/trackertest", Run: "^TestLabFrames$", Where: InLab, Timeout: 30 * time.Minute},
		{ID: "names-rules", Package: "./internal/namestest", Run: "^TestRules$", Where: Native, Timeout: 10 * time.Minute},
		{ID: "names-rules-raced", Package: "./internal/namestest", Run: "^TestRaceFindsBrokenRules$", Where: Native, Timeout: 30 * time.Minute},
		{ID: "names-race", Package: "./internal/namestest", Run: "^TestRace$", Where: Native, Timeout: 20 * time.Minute},
		{ID: "names-race-npt", Package: "./internal/namestest", Run: "^TestLabRace$", Where: InLab, Timeout: 90 * time.Minute},
		{ID: "names-tree", Package: "./vmm", Run: "^TestLinuxNamesATree$", Where: InLab, Timeout: 60 * time.Minute},
		{ID: "names-index", Package: "./vmm", Run: "^TestLinuxNamesByIndex$", Where: InLab, Timeout: 60 * time.Minute},
		{ID: "boot-corpus", Package: "./vmm", Run: "^TestLinuxCorpus$", Where: InLab, Timeout: 60 * time.Minute},
		{ID: "boots-linux", Package: "./vmm", Run: "^TestLinuxBootsLeaveNothing$", Where: InLab, Timeout: 30 * time.Minute},
		{ID: "restore-native", Package: "./vmm", Run: "^TestRestoreGoesOn$", Where: Native, Timeout: 20 * time.Minute},
		{ID: "restore-hostile", Package: "./vmm", Run: "^TestRestoreHostile$", Where: Native, Timeout: 20 * time.Minute},
		{ID: "restore-linux", Package: "./vmm", Run: "^TestLinuxRestore$", Where: InLab, Timeout: 60 * time.Minute},
		{ID: "restore-clock", Package: "./vmm", Run: "^TestLinuxRestoreWallClock$", Where: InLab, Timeout: 30 * time.Minute},
		{ID: "snapshot-race", Package: "./vmm", Run: "^TestSaveRace$", Where: Native, Timeout: 20 * time.Minute},
		{ID: "snapshot-states", Package: "./vmm", Run: "^TestSaveStates$", Where: Native, Timeout: 20 * time.Minute},
		{ID: "snapshot-chain", Package: "./vmm", Run: "^TestSaveChain$", Where: Native, Timeout: 20 * time.Minute},
		{ID: "snapshot-overwritten", Package: "./vmm", Run: "^TestSaveOverwritten$", Where: Native, Timeout: 10 * time.Minute},
		{ID: "names-maps", Package: "./vmm", Run: "^TestRestoreMaps$", Where: Native, Timeout: 10 * time.Minute},
		{ID: "snapshot-killed", Package: "./cmd/ditto", Run: "^TestSnapshotKilled$", Where: Native, Timeout: 30 * time.Minute},
		{ID: "snapshot-client-killed", Package: "./cmd/ditto", Run: "^TestSnapshotClientKilled$", Where: Native, Timeout: 30 * time.Minute},
		{ID: "snapshot-linux", Package: "./internal/e2e", Run: "^TestLinuxSnapshot$", Where: InLab, Timeout: 60 * time.Minute},
		{ID: "snapshot-load", Package: "./internal/e2e", Run: "^TestLinuxSnapshotUnderLoad$", Where: InLab, Timeout: 60 * time.Minute},
		{ID: "clones-bridge", Package: "./internal/e2e", Run: "^TestLinuxClonesOnABridge$", Where: InLab, Timeout: 30 * time.Minute},
		{ID: "migrate-killed", Package: "./cmd/ditto", Run: "^TestMigrateKilled$", Where: Native, Timeout: 60 * time.Minute},
		{ID: "upgrade-killed", Package: "./cmd/ditto", Run: "^TestUpgradeKilled$", Where: Native, Timeout: 60 * time.Minute},
		{ID: "migrate-native", Package: "./vmm", Run: "^TestMigrateBackAndForth$", Where: Native, Timeout: 30 * time.Minute},
		{ID: "disk-raw", Package: "./vmm", Run: "^TestLinuxDiskContent$", Where: InLab, Timeout: 30 * time.Minute},
		{ID: "disk-content", Package: "./internal/e2e/storage", Run: "^TestLabDiskContent$", Where: InLab, Timeout: 30 * time.Minute},
		{ID: "disk-erase", Package: "./internal/e2e/storage", Run: "^TestLabErase$", Where: InLab, Timeout: 30 * time.Minute},
		{ID: "disk-locks", Package: "./internal/e2e/storage", Run: "^TestLabLocks$", Where: InLab, Timeout: 30 * time.Minute},
		{ID: "seabios", Package: "./internal/e2e/storage", Run: "^TestLabSeaBIOS$", Where: InLab, Timeout: 30 * time.Minute},
		// They boot labs themselves, to kill them.
		{ID: "power-cut", Package: "./internal/e2e/storage", Run: "^TestBootPowerCut", Where: Native, Timeout: 90 * time.Minute},
		{ID: "snapshot-power-cut", Package: "./internal/e2e/storage", Run: "^TestBootSnapshotPowerCut$", Where: Native, Timeout: 90 * time.Minute},
	}
}

// FuzzTime is how long `make prove` runs each fuzz target.
const FuzzTime = 5 * time.Minute
