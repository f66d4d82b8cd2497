package bench

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestAddClone(t *testing.T) {
	sample := Sample{}
	for _, text := range []string{
		`{"guest_pss_bytes": 10485760, "guest_copied_bytes": 1048576, "anonymous_bytes": 2097152}`,
		`{"guest_pss_bytes": 5242880, "guest_copied_bytes": 0, "anonymous_bytes": 1048576}`,
	} {
		if err := addClone(sample, []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	want := Sample{"pss": 15, "written": 1, "beyond": 14, "own": 3}
	if diff := cmp.Diff(want, sample); diff != "" {
		t.Errorf("sample (-want +got):\n%s", diff)
	}
	for _, bad := range []string{"", "{}", `{"guest_pss_bytes": 1}`} {
		if addClone(sample, []byte(bad)) == nil {
			t.Errorf("addClone(%q) succeeds", bad)
		}
	}
}
