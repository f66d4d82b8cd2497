package vmm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"ditto.vm/vmm/config"
	"ditto.vm/vmm/kvm"
)

// maxCPUFile bounds a file with a CPU model; one of a large CPU has 3 KiB.
const maxCPUFile = 64 << 10

// CPUModel is a guest CPU by its features. Guests of one model can run on every
// host that has at least these: a model is made on one host and used on others
// of the same vendor.
type CPUModel struct {
	// Vendor is what CPUID leaf 0 says, as in "GenuineIntel". A guest cannot go
	// to a host of another.
	Vendor string `json:"vendor"`
	// Features are named as in /proc/cpuinfo; those of KVM begin with kvm_.
	Features []string `json:"features"`
}

// CPUModelError is a file that does not describe a CPU.
type CPUModelError struct {
	Path string // empty if it is no file
	Err  error
}

// Error implements error.
func (e *CPUModelError) Error() string {
	if e.Path == "" {
		return fmt.Sprintf("CPU model: %v", e.Err)
	}
	return fmt.Sprintf("CPU model %s: %v", e.Path, e.Err)
}

// Unwrap returns the cause.
func (e *CPUModelError) Unwrap() error { return e.Err }

// LoadCPUModel reads and validates the YAML or JSON file at path, which nobody
// needs to trust.
func LoadCPUModel(path string) (CPUModel, error) {
	f, err := os.Open(path)
	if err != nil {
		return CPUModel{}, &CPUModelError{Err: fmt.Errorf("%w: write one with 'ditto cpu -o FILE', or use host or baseline", err)}
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxCPUFile+1))
	if err != nil {
		return CPUModel{}, &CPUModelError{Err: err}
	}
	m, err := ParseCPUModel(data)
	if err != nil {
		return CPUModel{}, &CPUModelError{path, err}
	}
	return m, nil
}

// ParseCPUModel reads a model in YAML or JSON and validates it. Its features are
// put in order.
func ParseCPUModel(data []byte) (CPUModel, error) {
	if len(data) > maxCPUFile {
		return CPUModel{}, fmt.Errorf("larger than %s: not a CPU model", config.Bytes(maxCPUFile))
	}
	var m CPUModel
	if err := yaml.UnmarshalStrict(data, &m); err != nil {
		return CPUModel{}, errors.New(strings.Join(strings.Fields(err.Error()), " "))
	}
	if err := m.Validate(); err != nil {
		return CPUModel{}, err
	}
	m.Features = ordered(m.has())
	return m, nil
}

// Encode returns m as a file: JSON if the name ends so, YAML otherwise.
func (m CPUModel) Encode(path string) ([]byte, error) {
	if filepath.Ext(path) != ".json" {
		return yaml.Marshal(m)
	}
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetIndent("", "  ")
	err := e.Encode(m)
	return out.Bytes(), err
}

// Validate refuses a model that no CPU can be, or that no guest of ditto runs
// on.
func (m CPUModel) Validate() error {
	if !validVendor(m.Vendor) {
		return fmt.Errorf("vendor %q is not what a CPU says of itself: 'ditto cpu' shows this host's", m.Vendor)
	}
	known := map[string]bool{}
	for _, w := range modelWords() {
		for _, name := range strings.Fields(w.names) {
			known[name] = name != "-"
		}
	}
	has := m.has()
	var unknown []string
	for _, f := range m.Features {
		if !known[f] && !slices.Contains(platformFeatures, f) {
			unknown = append(unknown, fmt.Sprintf("%.40q", f))
		}
	}
	if len(unknown) > 0 {
		return fmt.Errorf("unknown features %s: 'ditto cpu' shows those that this host has", shorten(unknown))
	}
	for _, d := range featureNeeds {
		for _, f := range strings.Fields(d.features) {
			if has[f] && !has[d.needs] {
				return fmt.Errorf("%s needs %s: add it, or leave out both", f, d.needs)
			}
		}
	}
	var lacks []string
	for _, f := range strings.Fields(bootFeatures) {
		if !has[f] {
			lacks = append(lacks, f)
		}
	}
	if len(lacks) > 0 {
		return fmt.Errorf("lacks %s, without which no 64-bit guest starts: begin with 'ditto cpu -o FILE' and leave features out", shorten(lacks))
	}
	return nil
}

// validVendor: twelve printable characters.
func validVendor(s string) bool {
	const length = 12 // EBX, EDX and ECX of leaf 0
	return len(s) > 0 && len(s) <= length && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })
}

// shorten joins the first words of a list.
func shorten(words []string) string {
	const most = 12
	if n := len(words) - most; n > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(words[:most], ", "), n)
	}
	return strings.Join(words, ", ")
}

// has is the set of features that are the model's to say.
func (m CPUModel) has() map[string]bool {
	has := make(map[string]bool, len(m.Features))
	for _, f := range m.Features {
		if !slices.Contains(platformFeatures, f) {
			has[f] = true
		}
	}
	return has
}

// ordered lists a set in the order of CPUID.
func ordered(has map[string]bool) []string {
	out := []string{}
	for _, w := range modelWords() {
		for _, name := range strings.Fields(w.names) {
			if has[name] {
				out = append(out, name)
			}
		}
	}
	return out
}

// Missing returns a [FeatureError] if a host of the CPU h cannot run guests of
// m.
func (m CPUModel) Missing(h CPUModel) error {
	if m.Vendor != h.Vendor {
		return &FeatureError{Vendor: m.Vendor, Host: h.Vendor}
	}
	var missing []string
	has := h.has()
	for _, f := range ordered(m.has()) {
		if !has[f] {
			missing = append(missing, f)
		}
	}
	if len(missing) > 0 {
		return &FeatureError{Missing: missing}
	}
	return nil
}

// CommonCPU returns the largest model that all hosts of the given ones can run.
// Different vendors have none.
func CommonCPU(models ...CPUModel) (CPUModel, error) {
	if len(models) == 0 {
		return CPUModel{}, errors.New("no CPU model is given")
	}
	out := models[0]
	has := out.has()
	for _, m := range models[1:] {
		if m.Vendor != out.Vendor {
			return CPUModel{}, fmt.Errorf("CPUs of %q and of %q run no guest in common: a guest keeps its vendor", out.Vendor, m.Vendor)
		}
		other := m.has()
		for f := range has {
			if !other[f] {
				delete(has, f)
			}
		}
	}
	dropUnmet(has)
	out.Features = ordered(has)
	return out, out.Validate()
}

// dropUnmet removes features whose needs are not there. Needs come before what
// needs them in the list, so that one pass is enough.
func dropUnmet(has map[string]bool) {
	for _, d := range featureNeeds {
		for _, f := range strings.Fields(d.features) {
			if !has[d.needs] {
				delete(has, f)
			}
		}
	}
}

// BaselineCPU returns x86-64-v2, without what the host h lacks.
func BaselineCPU(h CPUModel) CPUModel {
	has, host := map[string]bool{}, h.has()
	for _, f := range strings.Fields(bootFeatures + " " + baselineFeatures) {
		has[f] = host[f]
	}
	dropUnmet(has)
	return CPUModel{Vendor: h.Vendor, Features: ordered(has)}
}

// HostCPU returns the CPU that guests of this host have unless told otherwise.
func HostCPU() (CPUModel, error) {
	s, err := kvm.Open()
	if err != nil {
		return CPUModel{}, err
	}
	defer s.Close()
	supported, err := s.SupportedCPUID()
	if err != nil {
		return CPUModel{}, err
	}
	return modelOf(guestCPUID(supported, 1, s.CheckExtension(kvm.CapTSCDeadlineTimer) != 0)), nil
}

// modelOf reads a model from CPUID.
func modelOf(entries []kvm.CPUIDEntry) CPUModel {
	has := map[string]bool{}
	for _, w := range modelWords() {
		value := w.register.of(cpuidLeaf(entries, w.leaf, w.index))
		for bit, name := range strings.Fields(w.names) {
			if name != "-" && value&(1<<bit) != 0 && !slices.Contains(platformFeatures, name) {
				has[name] = true
			}
		}
	}
	dropUnmet(has)
	return CPUModel{Vendor: cpuVendor(entries), Features: ordered(has)}
}

// chooseCPU narrows a guest's CPUID to what its configuration asks for.
func chooseCPU(guest []kvm.CPUIDEntry, choice string) ([]kvm.CPUIDEntry, error) {
	host := modelOf(guest)
	switch choice {
	case config.CPUHost, "":
		return guest, nil
	case config.CPUBaseline:
		return narrowCPUID(guest, BaselineCPU(host)), nil
	}
	m, err := LoadCPUModel(choice)
	if err != nil {
		return nil, err
	}
	if err := m.Missing(host); err != nil {
		return nil, &CPUModelError{choice, fmt.Errorf("%w: 'ditto cpu common' makes one that several hosts can run", err)}
	}
	return narrowCPUID(guest, m), nil
}
