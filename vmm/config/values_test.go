package config

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ditto.vm/images/disk"
)

func TestParseBytes(t *testing.T) {
	for _, test := range []struct {
		text string
		want Bytes
		out  string
	}{
		{"0", 0, "0"}, {"1", 1, "1"}, {"4096", 4096, "4KiB"}, {"512M", 512 << 20, "512MiB"},
		{"2GiB", 2 << 30, "2GiB"}, {"3tb", 3 << 40, "3TiB"}, {"1536K", 1536 << 10, "1536KiB"},
	} {
		got, err := ParseBytes(test.text)
		if err != nil || got != test.want || got.String() != test.out {
			t.Errorf("%s: %d (%s), %v; want %d (%s)", test.text, got, got, err, test.want, test.out)
		}
		if back, err := ParseBytes(got.String()); err != nil || back != got {
			t.Errorf("%s: reads back as %d, %v", got, back, err)
		}
	}
	for _, text := range []string{"", "M", "-1", "1.5G", "1X", "1 G", "16777216T", "99999999999999999999", "1GM"} {
		if got, err := ParseBytes(text); err == nil {
			t.Errorf("%q was read as %d", text, got)
		}
	}
}

func TestParseDisk(t *testing.T) {
	for _, test := range []struct {
		text string
		want Disk
	}{
		{"a.img", Disk{Path: "a.img"}},
		{"a,,b.img,ro", Disk{Path: "a,b.img", ReadOnly: true}},
		{"path=a=b.img,readonly=off,serial=X,cache=none,queues=2", Disk{Path: "a=b.img", Serial: "X", Cache: disk.CacheNone, Queues: 2}},
		{"a=b.img", Disk{Path: "a=b.img"}},
	} {
		got, err := ParseDisk(test.text)
		if err != nil {
			t.Errorf("%s: %v", test.text, err)
		}
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s: %s", test.text, diff)
		}
	}
	for _, text := range []string{"", ",ro", "a,cache=no", "a,queues=x", "a,size=3", "a,ro=perhaps"} {
		if got, err := ParseDisk(text); err == nil {
			t.Errorf("%q was read as %+v", text, got)
		}
	}
	if got := (Disk{}).QueueCount(64); got != 4 {
		t.Errorf("64 vCPUs get %d queues, want 4", got)
	}
	if got := (Disk{Queues: 7}).QueueCount(1); got != 7 {
		t.Errorf("7 queues asked for, got %d", got)
	}
}

func TestParseNet(t *testing.T) {
	got, err := ParseNet("user,forward=8080:80,forward=[::1]:53:53/udp,mac=02:00:00:00:00:01,mtu=1400")
	want := Net{MAC: "02:00:00:00:00:01", MTU: 1400, Forwards: []Forward{{"tcp", "", 8080, 80}, {"udp", "::1", 53, 53}}}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Error(err, diff)
	}
	for _, text := range []string{"", "wifi", "user,mtu=x", "user,forward=1", "tap,speed=9"} {
		if got, err := ParseNet(text); err == nil {
			t.Errorf("%q was read as %+v", text, got)
		}
	}
}

func TestForward(t *testing.T) {
	for _, test := range []struct{ text, out, listen string }{
		{"8080:80", "8080:80", "127.0.0.1:8080"},
		{"8080:80/tcp", "8080:80", "127.0.0.1:8080"},
		{"0.0.0.0:53:5353/udp", "0.0.0.0:53:5353/udp", "0.0.0.0:53"},
		{"[::1]:1:2", "[::1]:1:2", "[::1]:1"},
	} {
		var f Forward
		if err := f.UnmarshalText([]byte(test.text)); err != nil || f.String() != test.out || f.Listen() != test.listen {
			t.Errorf("%s: %s listening on %s, %v", test.text, f, f.Listen(), err)
		}
	}
	for _, text := range []string{"", "80", "0:80", "80:0", "65536:1", "::1:80:80", "host:80:80", "80:80/sctp", ":80:80"} {
		var f Forward
		if err := f.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q was read as %s", text, f)
		}
	}
}

func TestHardwareAddr(t *testing.T) {
	seen := map[string]bool{}
	for _, name := range []string{"a", "b", "web-1"} {
		for i := range 4 {
			mac, err := Net{}.HardwareAddr(name, i)
			if err != nil || len(mac) != 6 || mac[0]&1 != 0 || mac[0]&2 == 0 || seen[mac.String()] {
				t.Errorf("%s %d: %s, %v: not a fresh, local unicast address", name, i, mac, err)
			}
			seen[mac.String()] = true
		}
	}
	// The address of a machine must never change between versions.
	mac, _ := Net{}.HardwareAddr("web", 0)
	if want := "16:01:6c:8f:c6:b3"; mac.String() != want {
		t.Errorf("web 0 has %s, want %s", mac, want)
	}
}

func TestEnumsRoundTrip(t *testing.T) {
	for text, v := range map[string]interface {
		UnmarshalText([]byte) error
		MarshalText() ([]byte, error)
	}{
		"virtio": new(Console), "stop": new(RebootPolicy), "writethrough": new(disk.Cache),
		"socket": new(NetMode), "on": new(OnOff), "1m30s": new(Duration),
	} {
		if err := v.UnmarshalText([]byte(strings.ToLower(text))); err != nil {
			t.Error(err)
		}
		if out, _ := v.MarshalText(); string(out) != text {
			t.Errorf("%s came back as %s", text, out)
		}
		if err := v.UnmarshalText([]byte("nonsense")); err == nil {
			t.Errorf("%T accepts nonsense", v)
		}
	}
	if s := NetMode(77).String(); s != "invalid(77)" {
		t.Error(s)
	}
}
