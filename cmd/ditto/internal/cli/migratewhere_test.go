package cli

import "testing"

// TestLoopback: only addresses that are this host's for certain; a name may be
// anybody's.
func TestLoopback(t *testing.T) {
	for text, want := range map[string]bool{
		"tcp://127.0.0.1:7": true, "tcp://127.9.9.9": true, "tcp://[::1]:7788": true,
		"tcp://10.0.0.1": false, "tcp://localhost": false, "tcp://[::2]": false, "ssh://127.0.0.1": true,
	} {
		d, err := parseDestination(text, "ssh", nil)
		if err != nil || d.loopback() != want {
			t.Errorf("%s: %v, %v", text, d.loopback(), err)
		}
	}
}
