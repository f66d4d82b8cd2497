package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// reportVersion changes when the meaning of a field does.
const reportVersion = 1

// Report is the JSON file: the newest result of each benchmark.
type Report struct {
	Version int      `json:"version"`
	Results []Result `json:"results"`
}

// LoadReport reads a report. A file that does not exist is an empty report.
func LoadReport(path string) (Report, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Report{Version: reportVersion}, nil
	}
	if err != nil {
		return Report{}, fmt.Errorf("report: %w", err)
	}
	var r Report
	if err := json.Unmarshal(data, &r); err != nil {
		return Report{}, fmt.Errorf("report %s: %w", path, err)
	}
	if r.Version != reportVersion {
		return Report{}, fmt.Errorf("report %s has version %d, this program writes %d: move it away", path, r.Version, reportVersion)
	}
	return r, nil
}

// Put adds a result, or replaces the one of the same benchmark.
func (r *Report) Put(result Result) {
	for i := range r.Results {
		if r.Results[i].Name == result.Name {
			r.Results[i] = result
			return
		}
	}
	r.Results = append(r.Results, result)
}

// Result returns the result of a benchmark, or nil.
func (r *Report) Result(name string) *Result {
	for i := range r.Results {
		if r.Results[i].Name == name {
			return &r.Results[i]
		}
	}
	return nil
}

// Save writes the report; the file is replaced as a whole.
func (r *Report) Save(path string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return replaceFile(path, append(data, '\n'))
}

// replaceFile writes a file under a temporary name and renames it.
func replaceFile(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }()
	_, err = f.Write(data)
	if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
