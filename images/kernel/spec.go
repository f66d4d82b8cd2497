package kernel

import (
	"cmp"
	"fmt"
	"regexp"
	"strings"
)

// Flavours of Debian's amd64 kernels.
const (
	Generic = "generic" // linux-image-*-amd64: every driver
	Cloud   = "cloud"   // linux-image-*-cloud-amd64: what clouds need
	RT      = "rt"      // linux-image-*-rt-amd64: PREEMPT_RT
)

// spec is a parsed kernel specification: VERSION[-FLAVOUR].
type spec struct {
	version string // prefix of the version, on a dot boundary; "" is any
	flavour string // Generic, Cloud or RT
}

var versionRE = regexp.MustCompile(`^[0-9]+(\.[0-9]+)*([+-][0-9a-z.+~-]*)?$`)

// parseSpec reads "6.12", "6.12-cloud", "6.1.0-50-cloud" or "cloud". A full
// release as uname -r prints it ("6.1.0-50-cloud-amd64") is taken as well.
func parseSpec(s string) (spec, error) {
	version := strings.TrimSuffix(s, "-amd64")
	flavour := Generic
	for _, f := range []string{Generic, Cloud, RT} {
		if v, ok := strings.CutSuffix(version, f); ok && (v == "" || strings.HasSuffix(v, "-")) {
			version, flavour = strings.TrimSuffix(v, "-"), f
			break
		}
	}
	if version == "" && s != flavour || version != "" && !versionRE.MatchString(version) {
		return spec{}, fmt.Errorf(`kernel %q is neither a file nor like "6.12", "6.12-cloud" or "cloud"`, s)
	}
	return spec{version: version, flavour: flavour}, nil
}

// matches tells whether a release ("6.12.95+deb12-cloud-amd64") fits the spec.
func (s spec) matches(release string) bool {
	version, flavour := splitRelease(release)
	if flavour != s.flavour || flavour == "" {
		return false
	}
	rest, ok := strings.CutPrefix(version, s.version)
	return ok && (s.version == "" || rest == "" || !isDigit(rest[0]))
}

// splitRelease splits a Debian release into its version and flavour. A release
// that is not Debian's has the flavour "".
func splitRelease(release string) (version, flavour string) {
	base, ok := strings.CutSuffix(release, "-amd64")
	if !ok {
		return release, ""
	}
	for _, f := range []string{Cloud, RT} {
		if v, ok := strings.CutSuffix(base, "-"+f); ok {
			return v, f
		}
	}
	return base, Generic
}

// compareVersions orders versions as people read them: runs of digits by
// value, all else by bytes.
func compareVersions(a, b string) int {
	for a != "" && b != "" {
		if isDigit(a[0]) && isDigit(b[0]) {
			var x, y string
			x, a = cutDigits(a)
			y, b = cutDigits(b)
			if c := cmp.Or(cmp.Compare(len(x), len(y)), strings.Compare(x, y)); c != 0 {
				return c
			}
			continue
		}
		if a[0] != b[0] {
			return cmp.Compare(a[0], b[0])
		}
		a, b = a[1:], b[1:]
	}
	return cmp.Compare(len(a), len(b))
}

// cutDigits splits off the leading digits of s, without leading zeros.
func cutDigits(s string) (digits, rest string) {
	n := 0
	for n < len(s) && isDigit(s[n]) {
		n++
	}
	return strings.TrimLeft(s[:n], "0"), s[n:]
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }
