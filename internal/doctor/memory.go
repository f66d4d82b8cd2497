package doctor

import (
	"fmt"
	"path"
	"strconv"
	"strings"

	"ditto.vm/vmm"
)

// Limits below which a warning is worth it.
const (
	// minMaps is vm.max_map_count's default: each remapped run of pages costs
	// a mapping.
	minMaps = 65530
	// lowMemory is what a default guest and its kernel build need.
	lowMemory = 1 << 30
)

func (h *Host) checkMemory(r *report) {
	h.checkTHP(r)
	h.checkPool(r, "2M pool", 2048, "2M")
	h.checkPool(r, "1G pool", 1048576, "1G")
	h.checkAvailable(r)
	h.checkCgroup(r)
	switch h.read("proc/sys/vm/overcommit_memory") {
	case "2":
		r.add(Warn, "overcommit", "strict: guests larger than free memory do not start", "sysctl vm.overcommit_memory=0")
	case "":
		r.add(Warn, "overcommit", "unknown", "mount /proc")
	default:
		r.add(OK, "overcommit", "allowed", "")
	}
	if n, ok := h.number("proc/sys/vm/max_map_count"); ok && n < minMaps {
		r.add(Warn, "mappings", fmt.Sprintf("%d a process", n), fmt.Sprintf("sysctl vm.max_map_count=%d: sharing memory page by page needs many", minMaps))
	} else {
		r.add(OK, "mappings", fmt.Sprintf("%d a process", n), "")
	}
	if h.Limit != nil {
		locked, files := h.Limit()
		r.add(OK, "locked memory", limitText(locked), "")
		if files < 1024 {
			r.add(Warn, "open files", limitText(files), "ulimit -n 4096: each disk queue and interrupt needs some")
		}
	}
	switch {
	case !h.exists("sys/kernel/mm/ksm/run"):
		r.add(Warn, "page merging", "the kernel has no KSM", "use a kernel with CONFIG_KSM")
	case h.read("sys/kernel/mm/ksm/run") != "1":
		r.add(Warn, "page merging", "KSM is there but switched off", "echo 1 > /sys/kernel/mm/ksm/run")
	default:
		r.add(OK, "page merging", "KSM is on", "")
	}
	if h.exists("proc/pressure/memory") {
		r.add(OK, "pressure", "PSI tells when memory is short", "")
	} else {
		r.add(Warn, "pressure", "no PSI: memory pressure is not noticed", "boot with psi=1")
	}
}

func (h *Host) checkTHP(r *report) {
	if why, cure := vmm.LargePagesMissing(h.Root); why != "" {
		r.add(Warn, "large pages", why, cure)
		return
	}
	r.add(OK, "large pages", "transparent, "+h.chosen("sys/kernel/mm/transparent_hugepage/enabled"), "")
}

// checkPool looks at a hugetlbfs pool.
func (h *Host) checkPool(r *report, name string, pageKiB uint64, flag string) {
	dir := fmt.Sprintf("sys/kernel/mm/hugepages/hugepages-%dkB", pageKiB)
	total, ok := h.number(dir + "/nr_hugepages")
	free, _ := h.number(dir + "/free_hugepages")
	switch {
	case !ok:
		r.add(Warn, name, "the CPU or the kernel has no such pages", "")
	case total == 0:
		r.add(OK, name, fmt.Sprintf("empty: fill it before --hugepages %s", flag), "")
	default:
		r.add(OK, name, fmt.Sprintf("%s, %s free", size(total*pageKiB<<10), size(free*pageKiB<<10)), "")
	}
}

func (h *Host) checkAvailable(r *report) {
	text, _, _ := strings.Cut(h.field("proc/meminfo", "MemAvailable"), " ")
	kib, err := strconv.ParseUint(text, 10, 64)
	switch available := kib << 10; {
	case err != nil:
		r.add(Warn, "available", "unknown", "mount /proc")
	case available < lowMemory:
		r.add(Warn, "available", size(available), "end other programs, or use smaller guests")
	default:
		r.add(OK, "available", size(available), "")
	}
}

// checkCgroup finds the lowest memory limit above this process.
func (h *Host) checkCgroup(r *report) {
	limit, found := ^uint64(0), false
	for line := range strings.Lines(h.read("proc/self/cgroup")) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		base, file := "", ""
		switch {
		case parts[0] == "0" && parts[1] == "":
			base, file = "sys/fs/cgroup", "memory.max"
		case strings.Contains(","+parts[1]+",", ",memory,"):
			base, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
		default:
			continue
		}
		for dir := path.Clean("/" + parts[2]); ; dir = path.Dir(dir) {
			if n, ok := h.number(base + dir + "/" + file); ok {
				limit, found = min(limit, n), true
			}
			if dir == "/" {
				break
			}
		}
	}
	switch {
	case !found || limit > 1<<50: // version 1 has no word for unlimited
		r.add(OK, "cgroup limit", "none", "")
	case limit < lowMemory:
		r.add(Warn, "cgroup limit", size(limit), "raise memory.max of the control group, or use smaller guests")
	default:
		r.add(OK, "cgroup limit", size(limit), "")
	}
}

func limitText(n uint64) string {
	if n == ^uint64(0) {
		return "unlimited"
	}
	return strconv.FormatUint(n, 10)
}
