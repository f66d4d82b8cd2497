package doctor

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ditto.vm/memory"
	"ditto.vm/vmm"
	"ditto.vm/vmm/kvm"
)

// fakeKVM has every capability in caps.
type fakeKVM struct {
	caps  map[kvm.Capability]int
	linux kvm.Linux
	err   error
	open  *int
}

func (k *fakeKVM) CheckExtension(c kvm.Capability) int { return k.caps[c] }
func (k *fakeKVM) ProbeLinux() (kvm.Linux, error)      { return k.linux, k.err }
func (k *fakeKVM) Close() error                        { *k.open--; return nil }

// tree writes files below a new root.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// goodFiles are those of a host that has everything.
func goodFiles() map[string]string {
	return map[string]string{
		"proc/sys/kernel/osrelease":                                "6.18.1\n",
		"proc/cpuinfo":                                             "processor : 0\nmodel name : AMD EPYC\nflags : fpu svm hypervisor\n",
		"proc/meminfo":                                             "MemTotal: 8000000 kB\nMemAvailable: 4194304 kB\n",
		"proc/self/cgroup":                                         "0::/user.slice/me\n",
		"sys/fs/cgroup/user.slice/me/memory.max":                   "max\n",
		"sys/fs/cgroup/user.slice/memory.max":                      "2147483648\n",
		"proc/sys/vm/overcommit_memory":                            "0\n",
		"proc/sys/vm/max_map_count":                                "1048576\n",
		"proc/pressure/memory":                                     "some\n",
		"proc/sys/kernel/seccomp/actions_avail":                    "kill_process kill_thread trap errno allow\n",
		"sys/module/kvm_amd/parameters/npt":                        "Y\n",
		"sys/kernel/mm/transparent_hugepage/enabled":               "always [madvise] never\n",
		"sys/kernel/mm/ksm/run":                                    "1\n",
		"sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages":    "512\n",
		"sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages":  "256\n",
		"sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages": "0\n",
		"dev/userfaultfd":                                          "",
	}
}

// goodHost has everything. open counts KVMs that were not closed.
func goodHost(t *testing.T, files map[string]string) (h *Host, k *fakeKVM) {
	open := 0
	k = &fakeKVM{open: &open, linux: kvm.Linux{OK: true}, caps: map[kvm.Capability]int{
		kvm.CapBinaryStatsFD: 1, kvm.CapPreFaultMemory: 1, kvm.CapNRVCPUs: 4, kvm.CapMaxVCPUs: 64,
		kvm.CapManualDirtyLog2: 3, kvm.CapDirtyLogRingAcqRel: 65536,
	}}
	t.Cleanup(func() {
		if open != 0 {
			t.Errorf("%d KVMs left open", open)
		}
	})
	return &Host{
		Root: tree(t, files), UID: 1000,
		KVM:     func() (KVM, error) { open++; return k, nil },
		WPAsync: func() error { return nil }, IOUring: func() error { return nil },
		Landlock: func() int { return 7 }, Tap: func() error { return nil },
		Netd:  func() (string, error) { return "/bin/ditto-netd", nil },
		Limit: func() (uint64, uint64) { return ^uint64(0), 4096 },
	}, k
}

// find returns the finding called name.
func find(t *testing.T, r Report, area, name string) Finding {
	t.Helper()
	for _, f := range r.Findings {
		if f.Area == area && f.Name == name {
			return f
		}
	}
	t.Fatalf("nothing about %s %s", area, name)
	return Finding{}
}

func TestGoodHost(t *testing.T) {
	h, _ := goodHost(t, goodFiles())
	r := h.Examine()
	if !r.Ready || r.Err != nil {
		t.Errorf("not ready: %v", r.Err)
	}
	seen := map[string]bool{}
	for _, f := range r.Findings {
		if f.Status != OK || f.Cure != "" {
			t.Errorf("%+v", f)
		}
		if f.Value == "" || f.Area == "" || seen[f.Area+f.Name] {
			t.Errorf("empty or repeated: %+v", f)
		}
		seen[f.Area+f.Name] = true
	}
	for _, want := range []struct{ area, name, value string }{
		{"kvm", "kind", "AMD-V (kvm_amd)"}, {"kvm", "nested paging", "yes, NPT"},
		{"memory", "2M pool", "1.0 GiB, 512 MiB free"}, {"memory", "cgroup limit", "2.0 GiB"},
		{"memory", "locked memory", "unlimited"}, {"tracking", "auto", "takes wp-async"}, {"memory", "available", "4.0 GiB"},
	} {
		if f := find(t, r, want.area, want.name); f.Value != want.value {
			t.Errorf("%s: %q, want %q", want.name, f.Value, want.value)
		}
	}
	data, err := json.Marshal(r)
	if err != nil || !strings.HasPrefix(string(data), `{"ready":true,"findings":[{"area":"host",`) {
		t.Errorf("%.80s, %v", data, err)
	}
}

// TestAilments gives a host one thing to complain about at a time.
func TestAilments(t *testing.T) {
	broken := errors.New("broken")
	file := func(name, content string) func(map[string]string, *Host, *fakeKVM) {
		return func(files map[string]string, _ *Host, _ *fakeKVM) {
			if files == nil {
				return
			}
			if content == "" {
				delete(files, name)
				return
			}
			files[name] = content
		}
	}
	host := func(change func(*Host, *fakeKVM)) func(map[string]string, *Host, *fakeKVM) {
		return func(_ map[string]string, h *Host, k *fakeKVM) {
			if h != nil {
				change(h, k)
			}
		}
	}
	for _, test := range []struct {
		area, name string
		status     Status
		cure       string
		change     func(map[string]string, *Host, *fakeKVM)
	}{
		{"kvm", "device", Missing, "modprobe kvm_amd", host(func(h *Host, _ *fakeKVM) {
			h.KVM = func() (KVM, error) { return nil, fmt.Errorf("x: %w", kvm.ErrNoDevice) }
		})},
		{"kvm", "device", Missing, "usermod -aG kvm", host(func(h *Host, _ *fakeKVM) {
			h.KVM = func() (KVM, error) { return nil, kvm.ErrPermission }
		})},
		{"kvm", "linux", Missing, "VT-x or AMD-V", host(func(_ *Host, k *fakeKVM) { k.linux = kvm.Linux{Reason: "no"} })},
		{"kvm", "linux", Missing, "log", host(func(_ *Host, k *fakeKVM) { k.err = broken })},
		{"kvm", "nested paging", Warn, "npt=1", file("sys/module/kvm_amd/parameters/npt", "N")},
		{"kvm", "nested paging", Warn, "VT-x or AMD-V", file("sys/module/kvm_pvm/x", "1")},
		{"kvm", "statistics", Warn, "5.14", host(func(_ *Host, k *fakeKVM) { k.caps[kvm.CapBinaryStatsFD] = 0 })},
		{"kvm", "prefault", Warn, "6.11", host(func(_ *Host, k *fakeKVM) { k.caps[kvm.CapPreFaultMemory] = 0 })},
		{"memory", "large pages", Warn, "echo madvise", file("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]")},
		{"memory", "large pages", Warn, "CONFIG_TRANSPARENT", file("sys/kernel/mm/transparent_hugepage/enabled", "")},
		{"memory", "large pages", Warn, "hugepages-2048kB", file("sys/kernel/mm/transparent_hugepage/hugepages-2048kB/enabled", "always inherit madvise [never]")},
		{"memory", "available", Warn, "smaller guests", file("proc/meminfo", "MemAvailable: 1000 kB")},
		{"memory", "cgroup limit", Warn, "memory.max", file("sys/fs/cgroup/user.slice/memory.max", "1048576")},
		{"memory", "overcommit", Warn, "overcommit_memory=0", file("proc/sys/vm/overcommit_memory", "2")},
		{"memory", "mappings", Warn, "max_map_count=65530", file("proc/sys/vm/max_map_count", "100")},
		{"memory", "open files", Warn, "ulimit", host(func(h *Host, _ *fakeKVM) { h.Limit = func() (uint64, uint64) { return 1, 256 } })},
		{"memory", "page merging", Warn, "echo 1", file("sys/kernel/mm/ksm/run", "0")},
		{"memory", "page merging", Warn, "CONFIG_KSM", file("sys/kernel/mm/ksm/run", "")},
		{"memory", "pressure", Warn, "psi=1", file("proc/pressure/memory", "")},
		{"tracking", "wp-async", Warn, "6.7", host(func(h *Host, _ *fakeKVM) { h.WPAsync = func() error { return broken } })},
		{"tracking", "wp-async", Warn, "seccomp profile", host(func(h *Host, _ *fakeKVM) { h.WPAsync = func() error { return &memory.TrackerError{Err: unix.EPERM} } })},
		{"tracking", "wp-async", Warn, "CONFIG_USERFAULTFD", host(func(h *Host, _ *fakeKVM) { h.WPAsync = func() error { return &memory.TrackerError{Err: unix.ENOSYS} } })},
		{"tracking", "auto", Warn, "wp-async", host(func(h *Host, _ *fakeKVM) { h.WPAsync = func() error { return broken } })},
		{"tracking", "auto", Warn, "kvm-log", host(func(h *Host, k *fakeKVM) {
			h.WPAsync = func() error { return broken }
			k.caps[kvm.CapManualDirtyLog2] = 1
		})},
		{"tracking", "kvm-log", Warn, "5.7", host(func(_ *Host, k *fakeKVM) { k.caps[kvm.CapManualDirtyLog2] = 1 })},
		{"tracking", "kvm-ring", Warn, "5.11", host(func(_ *Host, k *fakeKVM) { k.caps[kvm.CapDirtyLogRingAcqRel] = 0 })},
		{"tracking", "faults of KVM", Warn, "/dev/userfaultfd", file("dev/userfaultfd", "")},
		{"network", "user mode", Warn, "next to ditto", host(func(h *Host, _ *fakeKVM) { h.Netd = func() (string, error) { return "", broken } })},
		{"network", "tap", Warn, "ip tuntap", host(func(h *Host, _ *fakeKVM) { h.Tap = func() error { return broken } })},
		{"disk", "io_uring", Warn, "5.19", host(func(h *Host, _ *fakeKVM) { h.IOUring = func() error { return broken } })},
		{"sandbox", "landlock", Warn, "lsm=", host(func(h *Host, _ *fakeKVM) { h.Landlock = func() int { return 0 } })},
		{"sandbox", "seccomp", Missing, "CONFIG_SECCOMP_FILTER", file("proc/sys/kernel/seccomp/actions_avail", "")},
	} {
		files := goodFiles()
		test.change(files, nil, nil)
		h, k := goodHost(t, files)
		test.change(nil, h, k)
		r := h.Examine()
		f := find(t, r, test.area, test.name)
		if f.Status != test.status || !strings.Contains(f.Cure, test.cure) {
			t.Errorf("%+v, want %s with %q", f, test.status, test.cure)
		}
		if wantReady := test.status != Missing; r.Ready != wantReady {
			t.Errorf("%s %s: ready is %t", test.area, test.name, r.Ready)
		}
	}
}

func TestErrIsClassified(t *testing.T) {
	h, k := goodHost(t, goodFiles())
	k.linux = kvm.Linux{Reason: "no"}
	if r := h.Examine(); !errors.Is(r.Err, vmm.ErrNoLinux) {
		t.Errorf("%v", r.Err)
	}
}

// TestCgroupV1 reads the limit of the older hierarchy.
func TestCgroupV1(t *testing.T) {
	for _, test := range []struct{ limit, want string }{{"9223372036854771712", "none"}, {"3221225472", "3.0 GiB"}} {
		files := goodFiles()
		files["proc/self/cgroup"] = "5:cpu,memory:/a\n1:name=systemd:/\n"
		files["sys/fs/cgroup/memory/a/memory.limit_in_bytes"] = test.limit
		h, _ := goodHost(t, files)
		if f := find(t, h.Examine(), "memory", "cgroup limit"); f.Value != test.want {
			t.Errorf("%q, want %q", f.Value, test.want)
		}
	}
}

// TestBareHost: nothing at all to read must not break anything.
func TestBareHost(t *testing.T) {
	r := (&Host{Root: t.TempDir(), UID: 1}).Examine()
	if len(r.Findings) == 0 {
		t.Error("nothing found")
	}
}

// TestThisHost examines the machine the tests run on.
func TestThisHost(t *testing.T) {
	r := ThisHost(func() (string, error) { return "", errors.New("none") }).Examine()
	if len(r.Findings) < 15 {
		t.Errorf("only %d findings", len(r.Findings))
	}
	for _, f := range r.Findings {
		if f.Status != OK && f.Cure == "" && !strings.HasSuffix(f.Name, "pool") {
			t.Errorf("no cure: %+v", f)
		}
	}
}
