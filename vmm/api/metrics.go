package api

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// formatMetrics renders the counters in the Prometheus text exposition format,
// version 0.0.4. Every metric carries the machine's name.
func formatMetrics(info Info, stats Stats) string {
	m := metrics{vm: info.Name}
	m.family("ditto_vm_running", "gauge", "Whether the machine is running (1) or not (0).")
	running := 0.0
	if info.State == Running {
		running = 1
	}
	m.sample(running)
	m.family("ditto_vm_uptime_seconds", "gauge", "Time since the machine was started.")
	m.sample(float64(stats.UptimeMs) / 1000)
	m.family("ditto_vm_cpus", "gauge", "vCPUs of the machine.")
	m.sample(float64(info.CPUs))
	m.family("ditto_vm_memory_bytes", "gauge", "RAM of the guest.")
	m.sample(float64(info.MemoryBytes))
	m.family("ditto_vm_guest_resident_bytes", "gauge", "RAM of the guest that is present in host memory.")
	m.sample(float64(stats.GuestResidentBytes))
	m.family("ditto_vm_guest_pss_bytes", "gauge", "The same, with what is shared divided among the processes that share it.")
	m.sample(float64(stats.GuestPSSBytes))
	m.family("ditto_vm_guest_copied_bytes", "gauge", "Of RAM of the guest that is mapped from files, what was written since.")
	m.sample(float64(stats.GuestCopiedBytes))
	m.family("ditto_vm_process_resident_bytes", "gauge", "Resident memory of the process, guest RAM included.")
	m.sample(float64(stats.ResidentBytes))
	m.family("ditto_vm_process_anonymous_bytes", "gauge", "Anonymous memory of the process without guest RAM.")
	m.sample(float64(stats.AnonymousBytes))
	m.family("ditto_vm_mapped_pages", "gauge", "Pages that KVM maps, by the size of the entry.")
	m.sample(float64(stats.Pages4K), "size", "4k")
	m.sample(float64(stats.Pages2M), "size", "2m")
	m.sample(float64(stats.Pages1G), "size", "1g")
	m.memory(stats)
	if len(stats.Exits) > 0 {
		m.family("ditto_vm_exits_total", "counter", "Exits from guest mode to the VMM, by reason.")
		for _, reason := range slices.Sorted(maps.Keys(stats.Exits)) {
			m.sample(float64(stats.Exits[reason]), "reason", reason)
		}
	}
	m.devices(stats.Devices)
	return m.out.String()
}

// metrics builds the text.
type metrics struct {
	vm   string
	name string // of the current family
	out  strings.Builder
}

func (m *metrics) family(name, kind, help string) {
	m.name = name
	fmt.Fprintf(&m.out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// sample writes one value of the current family with label pairs.
func (m *metrics) sample(value float64, labels ...string) {
	fmt.Fprintf(&m.out, "%s{vm=%s", m.name, quoteLabel(m.vm))
	for i := 0; i+1 < len(labels); i += 2 {
		fmt.Fprintf(&m.out, ",%s=%s", labels[i], quoteLabel(labels[i+1]))
	}
	m.out.WriteString("} " + strconv.FormatFloat(value, 'g', -1, 64) + "\n")
}

// memory writes how memory is tracked, mapped by the host, and named.
func (m *metrics) memory(stats Stats) {
	m.family("ditto_vm_tracker", "gauge", "How written pages are found: 1 for the tracker in use.")
	m.sample(1, "kind", stats.Tracker)
	m.family("ditto_vm_frames", "gauge", "Large frames, 2 MiB of RAM each, by how the host maps them.")
	m.sample(float64(stats.Frames.Large), "state", "large")
	m.sample(float64(stats.Frames.Small), "state", "small")
	m.sample(float64(stats.Frames.Empty), "state", "empty")
	m.counted("ditto_vm_small_frames", "gauge", "Small frames by reason; a frame may have several.", "reason", stats.Frames.Reasons)
	m.restore(stats.Restore)
	if !stats.Names.Enabled {
		return
	}
	events := maps.Clone(stats.Names.Counters)
	m.family("ditto_vm_named_pages", "gauge", "Pages that are named after blocks, and those of them that are proven.")
	for _, key := range []string{"named", "named_proven"} {
		m.sample(float64(events[key]), "names", key)
		delete(events, key)
	}
	m.counted("ditto_vm_name_events_total", "counter", "What happened to names of pages, in pages.", "event", events)
}

// counted writes a family with a sample for each key, as a label.
func (m *metrics) counted(name, kind, help, label string, values map[string]uint64) {
	if len(values) == 0 {
		return
	}
	m.family(name, kind, help)
	for _, key := range slices.Sorted(maps.Keys(values)) {
		m.sample(float64(values[key]), label, key)
	}
}

// restore writes how memory came out of a snapshot, if it did.
func (m *metrics) restore(r *RestoreStats) {
	if r == nil {
		return
	}
	m.family("ditto_vm_restore_bytes", "gauge", "RAM of a restored guest: mapped from files, copied, and still missing.")
	m.sample(float64(r.MappedBytes), "how", "mapped")
	m.sample(float64(r.CopiedBytes), "how", "copied")
	m.sample(float64(r.MissingBytes), "how", "missing")
	m.family("ditto_vm_restore_faults_total", "counter", "How often a restored guest had to wait for missing pages.")
	m.sample(float64(r.Faults))
}

func (m *metrics) devices(devices []DeviceStats) {
	written := false
	for _, d := range devices {
		for _, counter := range slices.Sorted(maps.Keys(d.Counters)) {
			if !written {
				m.family("ditto_vm_device_events_total", "counter", "What a device counted, by device and counter.")
				written = true
			}
			m.sample(float64(d.Counters[counter]), "device", d.Name, "kind", d.Kind, "counter", counter)
		}
	}
}

// quoteLabel escapes a label value as the format says, and drops bytes that are
// not UTF-8.
func quoteLabel(s string) string {
	s = strings.ToValidUTF8(s, "")
	return `"` + strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`).Replace(s) + `"`
}
