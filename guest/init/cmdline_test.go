package main

import (
	"encoding/base64"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestSplitCmdline(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want []word
	}{
		{"", nil},
		{"  quiet\tro\n", []word{{"quiet", "", false}, {"ro", "", false}}},
		{"a=b c=", []word{{"a", "b", true}, {"c", "", true}}},
		{`ditto.run="echo a b" x`, []word{{"ditto.run", "echo a b", true}, {"x", "", false}}},
		{`"ditto.run=echo a b" x`, []word{{"ditto.run", "echo a b", true}, {"x", "", false}}},
		{`r="a=b; c" -- init args`, []word{{"r", "a=b; c", true}}},
		{`open="never closed`, []word{{"open", "never closed", true}}},
		{`a"b c"d`, []word{{`a"b c"d`, "", false}}},
	} {
		if diff := cmp.Diff(tc.want, splitCmdline(tc.in), cmp.AllowUnexported(word{})); diff != "" {
			t.Errorf("%q (-want +got):\n%s", tc.in, diff)
		}
	}
}

func TestParseConfig(t *testing.T) {
	run := `echo "it's quoted" && true`
	for _, tc := range []struct {
		in   string
		want func(*config)
	}{
		{"", func(*config) {}},
		{"console=ttyS0 quiet virtio_net.x=1", func(*config) {}},
		{`ditto.run="ls -l /"`, func(c *config) { c.run = "ls -l /" }},
		{"ditto.run64=" + base64.StdEncoding.EncodeToString([]byte(run)), func(c *config) { c.run = run }},
		{"ditto.run64=" + base64.RawURLEncoding.EncodeToString([]byte{0xFB, 0xFF, 'x'}), func(c *config) { c.run = "\xfb\xffx" }},
		{"ditto.after=reboot ditto.hostname=g1", func(c *config) { c.after, c.hostname = actReboot, "g1" }},
		{"ditto.net=off", func(c *config) { c.nets = []netSpec{{mode: netOff}} }},
		{"ditto.net=eth1,10.0.0.2/24,10.0.0.1,1.1.1.1,9.9.9.9", func(c *config) {
			c.nets = []netSpec{{
				iface: "eth1", mode: netStatic, addr: netip.MustParsePrefix("10.0.0.2/24"),
				gateway: netip.MustParseAddr("10.0.0.1"),
				dns:     []netip.Addr{netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr("9.9.9.9")},
			}}
		}},
		{"ditto.net=fd00::2/64,,fd00::1", func(c *config) {
			c.nets = []netSpec{{mode: netStatic, addr: netip.MustParsePrefix("fd00::2/64"), dns: []netip.Addr{netip.MustParseAddr("fd00::1")}}}
		}},
		{"ditto.mount=off ditto.mount=LABEL=data,/data/,ro", func(c *config) {
			c.mountAuto = false
			c.mounts = []mountSpec{{"LABEL=data", "/data", true}}
		}},
		{"ditto.modules=a,,b-c ditto.netwait=2s ditto.stop=0s", func(c *config) {
			c.modules, c.netWait, c.stopGrace = []string{"a", "b-c"}, 2*time.Second, 0
		}},
		{"ditto.winsize=132x43 ditto.term=vt220 ditto.shell=/bin//bash", func(c *config) {
			c.winsize, c.term, c.shell = winsize{132, 43}, "vt220", "/bin/bash"
		}},
		{"root=LABEL=rootfs rootfstype=ext4 rootflags=noatime ro init=/bin/sh", func(c *config) {
			c.root = rootSpec{"LABEL=rootfs", "ext4", "noatime", "/bin/sh", true}
		}},
	} {
		want := defaultConfig()
		tc.want(&want)
		opts := []cmp.Option{
			cmp.AllowUnexported(config{}, netSpec{}, mountSpec{}, rootSpec{}, winsize{}),
			cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
			cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
		}
		if diff := cmp.Diff(want, parseConfig(tc.in), opts...); diff != "" {
			t.Errorf("%q (-want +got):\n%s", tc.in, diff)
		}
	}
}

func TestParseConfigComplains(t *testing.T) {
	for _, in := range []string{
		"ditto.run", "ditto.run=", "ditto.run64=!", "ditto.after=never", "ditto.unknown=1",
		"ditto.hostname=a/b", "ditto.net=eth0", "ditto.net=eth0,", "ditto.net=off,1.2.3.4",
		"ditto.net=1.2.3.4/24,fd00::1", "ditto.net=averyveryverylongname,dhcp", "ditto.net=1.2.3.4/24,x",
		"ditto.netwait=-1s", "ditto.netwait=1d", "ditto.netwait=9999h", "ditto.mount=vda", "ditto.mount=vda,rel",
		"ditto.mount=vda,/x,maybe", "ditto.shell=sh", "ditto.winsize=80", "ditto.winsize=0x0", "init=relative",
	} {
		c := parseConfig(in)
		if len(c.complaints) != 1 {
			t.Errorf("%q: complaints %q, want one", in, c.complaints)
		}
		c.complaints = nil
		if c.run != "" || c.nets != nil || c.mounts != nil || c.after != actPowerOff || c.hostname != "ditto" || c.netWait != defaultNetWait {
			t.Errorf("%q changed the configuration: %+v", in, c)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	for _, s := range []string{
		`quiet ditto.run="a b" ditto.net=eth0,10.0.0.2/24,10.0.0.1 root=/dev/vda -- x`,
		`ditto.run64=YQ== ditto.mount=LABEL=x,/y,ro "x=y z`, "ditto.winsize=80x24 ditto.netwait=1h",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		c := parseConfig(line)
		for _, s := range c.nets {
			if s.mode < netDHCP || s.mode > netStatic || s.mode == netStatic != s.addr.IsValid() || len(s.iface) > 15 {
				t.Errorf("inconsistent %+v", s)
			}
		}
		for _, m := range c.mounts {
			if !strings.HasPrefix(m.dir, "/") || m.source == "" {
				t.Errorf("inconsistent %+v", m)
			}
		}
		if c.netWait < 0 || c.netWait > maxDuration || c.winsize.cols == 0 || !strings.HasPrefix(c.root.init, "/") {
			t.Errorf("out of range: %+v", c)
		}
	})
}
