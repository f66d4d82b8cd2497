package labrun

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"ditto.vm/internal/labtest"
	"ditto.vm/internal/proofs"
)

// ProofsPath is the table of claims, from the root of the source tree.
const ProofsPath = "docs/proofs.md"

// StatePath is where a run of the proofs keeps what has passed.
const StatePath = "out/prove.json"

// state is what has been proven, so that an interrupted run can go on.
type state struct {
	// Tree is the fingerprint of the sources that were proven; a change begins
	// anew.
	Tree   string               `json:"tree"`
	Passed map[string]time.Time `json:"passed"`
}

// Prove runs the proofs whose ids are given, or all, and every fuzz target, and
// writes measured figures into ProofsPath. What has passed for the same
// sources is not run again unless again is set. It must run at the root of the
// source tree.
func (r *Runner) Prove(ctx context.Context, ids []string, again bool) error {
	jobs, err := r.jobs(ctx, ids)
	if err != nil {
		return err
	}
	tree, err := fingerprint(ctx)
	if err != nil {
		return err
	}
	st := loadState(StatePath)
	if st.Tree != tree || again {
		st = state{Tree: tree, Passed: map[string]time.Time{}}
	}
	var left []job
	for _, j := range jobs {
		if when, ok := st.Passed[j.id]; ok {
			r.printf("=== %s passed on %s\n", j.id, when.Format(time.DateTime))
			continue
		}
		if err := r.compile(ctx, &j); err != nil {
			return err
		}
		left = append(left, j)
	}
	var failed error
	r.pool(ctx, left, func(j job, report *Report, err error) {
		if err == nil {
			err = r.writeFigures(j, report)
		}
		if err == nil {
			st.Passed[j.id] = time.Now().Round(time.Second)
			err = st.save(StatePath)
		}
		failed = errors.Join(failed, err)
	})
	return errors.Join(failed, context.Cause(ctx))
}

// job is a test, a proof or a fuzz target.
type job struct {
	id     string
	target target
	fuzz   bool
}

// jobs collects what is to be proven.
func (r *Runner) jobs(ctx context.Context, ids []string) ([]job, error) {
	wanted := map[string]bool{}
	for _, id := range ids {
		wanted[id] = true
	}
	var jobs []job
	add := func(id string, t target, fuzz bool) {
		if len(ids) == 0 || wanted[id] {
			delete(wanted, id)
			jobs = append(jobs, job{id: id, target: t, fuzz: fuzz})
		}
	}
	for _, p := range Proofs() {
		pkgs, err := listPackages(ctx, p.Package)
		if err != nil {
			return nil, err
		}
		if len(pkgs) != 1 {
			return nil, fmt.Errorf("proof %s: %s is %d packages with tests", p.ID, p.Package, len(pkgs))
		}
		add(p.ID, target{
			pkg: pkgs[0], where: p.Where, timeout: p.Timeout,
			args: []string{"-test.run=" + p.Run},
			env:  []string{labtest.EnvProve + "=1"},
		}, false)
	}
	fuzz, err := fuzzTargets(ctx)
	if err != nil {
		return nil, err
	}
	for _, f := range fuzz {
		add(f.id, f.target, true)
	}
	if len(wanted) > 0 {
		return nil, fmt.Errorf("no proof is called %s", strings.Join(keys(wanted), ", "))
	}
	return jobs, nil
}

// fuzzTargets finds every fuzz target of the tree.
func fuzzTargets(ctx context.Context) ([]job, error) {
	pkgs, err := listPackages(ctx, "./...")
	if err != nil {
		return nil, err
	}
	var jobs []job
	for _, p := range pkgs {
		names, err := fuzzNames(p)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			jobs = append(jobs, job{
				id: "fuzz:" + strings.TrimPrefix(p.ImportPath, "ditto.vm/") + "." + name,
				target: target{
					pkg: p, where: Native, timeout: FuzzTime + 10*time.Minute,
					args: []string{"-test.run=^" + name + "$", "-test.fuzz=^" + name + "$", "-test.fuzztime=" + FuzzTime.String()},
				},
			})
		}
	}
	return jobs, nil
}

// fuzzNames reads the names of fuzz targets out of a package's test files.
func fuzzNames(p testPackage) ([]string, error) {
	var names []string
	for _, file := range append(p.TestGoFiles, p.XTestGoFiles...) {
		b, err := os.ReadFile(filepath.Join(p.Dir, file))
		if err != nil {
			return nil, err
		}
		for line := range bytes.Lines(b) {
			rest, ok := bytes.CutPrefix(line, []byte("func Fuzz"))
			if !ok {
				continue
			}
			if name, _, ok := bytes.Cut(rest, []byte("(")); ok {
				names = append(names, "Fuzz"+string(name))
			}
		}
	}
	return names, nil
}

// compile builds the test binary of a job that needs one.
func (r *Runner) compile(ctx context.Context, j *job) error {
	if j.fuzz {
		return nil
	}
	pkgs := []testPackage{j.target.pkg}
	if err := r.open(ctx, pkgs); err != nil {
		return err
	}
	j.target.pkg = pkgs[0]
	return nil
}

// writeFigures writes what a proof measured into the table of claims.
func (r *Runner) writeFigures(j job, report *Report) error {
	if report == nil {
		return nil
	}
	where := "here"
	if j.target.where == InLab && !r.Native {
		where = "in the emulated host"
	}
	for _, f := range report.Figures {
		text := fmt.Sprintf("%s (%s, %s)", f.Text, time.Now().Format(time.DateOnly), where)
		if err := proofs.UpdateFile(ProofsPath, f.ID, text); err != nil {
			return err
		}
	}
	return nil
}

// fingerprint identifies the sources: what is committed and what is changed,
// without the prose, which the proofs themselves change.
func fingerprint(ctx context.Context) (string, error) {
	h := sha256.New()
	for _, args := range [][]string{
		{"ls-files", "-s", "--", ":(exclude)*.md"},
		{"diff", "HEAD", "--", ".", ":(exclude)*.md"},
		{"ls-files", "--others", "--exclude-standard"},
	} {
		out, err := exec.CommandContext(ctx, "git", args...).Output()
		if err != nil {
			return "", fmt.Errorf("git %s: %w", args[0], err)
		}
		h.Write(out)
	}
	return hex.EncodeToString(h.Sum(nil)[:16]), nil
}

// loadState reads the state; one that cannot be read proves nothing.
func loadState(path string) state {
	var st state
	b, err := os.ReadFile(path)
	if err != nil || json.Unmarshal(b, &st) != nil || st.Passed == nil {
		return state{Passed: map[string]time.Time{}}
	}
	return st
}

func (st state) save(path string) error {
	b, err := json.MarshalIndent(st, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func keys(m map[string]bool) []string {
	var ks []string
	for k := range m {
		ks = append(ks, k)
	}
	return ks
}
