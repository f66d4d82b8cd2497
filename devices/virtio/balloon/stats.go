package balloon

import (
	"encoding/binary"
	"time"

	"golang.org/x/sys/unix"
)

// Stat names one of the guest's memory statistics (virtio 1.2 5.5.6.3). Sizes
// are in bytes, the others count events since the guest booted.
type Stat uint16

// The statistics, in the order of their tags.
const (
	StatSwapIn             Stat = iota // bytes swapped in
	StatSwapOut                        // bytes swapped out
	StatMajorFaults                    // page faults that needed I/O
	StatMinorFaults                    // page faults that did not
	StatFree                           // bytes not in use at all
	StatTotal                          // bytes that the guest manages
	StatAvailable                      // bytes for new programs without swapping
	StatCaches                         // bytes that can be reclaimed quickly
	StatHugetlbAllocations             // huge pages handed out
	StatHugetlbFailures                // huge pages that could not be
	StatOOMKills                       // out of memory kills
	StatAllocStalls                    // allocations that had to reclaim
	StatAsyncScans                     // pages scanned by kswapd
	StatDirectScans                    // pages scanned by allocations
	StatAsyncReclaims                  // pages reclaimed by kswapd
	StatDirectReclaims                 // pages reclaimed by allocations
	numStats
)

// statEntry is the size of struct virtio_balloon_stat: le16 tag, le64 val,
// packed.
const statEntry = 10

// maxStatEntries bounds what is read of one answer: each statistic a few times
// over, so that ones this device does not know find room too.
const maxStatEntries = 64

// Stats are what the driver answered last.
type Stats struct {
	// At is when the answer came; the zero time means never.
	At     time.Time
	values [numStats]uint64
	known  uint32 // bit per Stat
}

// Get returns a statistic, and whether the driver gave it.
func (s *Stats) Get(stat Stat) (uint64, bool) {
	if stat >= numStats {
		return 0, false
	}
	return s.values[stat], s.known&(1<<stat) != 0
}

// statNames are the names that Linux and QEMU use, in the order of the tags.
func statNames() [numStats]string {
	return [numStats]string{
		"swap_in", "swap_out", "major_faults", "minor_faults", "free_bytes", "total_bytes",
		"available_bytes", "cache_bytes", "hugetlb_allocations", "hugetlb_failures", "oom_kills",
		"alloc_stalls", "async_scans", "direct_scans", "async_reclaims", "direct_reclaims",
	}
}

// Named returns the statistics that the driver gave, by name.
func (s *Stats) Named() map[string]uint64 {
	named := map[string]uint64{}
	for stat, name := range statNames() {
		if v, ok := s.Get(Stat(stat)); ok {
			named[name] = v
		}
	}
	return named
}

// parseStats reads the driver's answer. Tags that are not known are skipped,
// and so is an entry that is cut short.
func parseStats(p []byte) Stats {
	var s Stats
	for ; len(p) >= statEntry; p = p[statEntry:] {
		tag := Stat(binary.LittleEndian.Uint16(p))
		if tag < numStats {
			s.values[tag] = binary.LittleEndian.Uint64(p[2:])
			s.known |= 1 << tag
		}
	}
	return s
}

// Stats returns what the driver answered last.
func (d *Device) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stats
}

// SetStatsInterval makes the device ask for statistics every so often, 0 for
// never. A driver gives them once by itself when it starts.
func (d *Device) SetStatsInterval(interval time.Duration) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return unix.EBADF
	}
	interval = max(interval, 0)
	spec := unix.ItimerSpec{
		Interval: unix.NsecToTimespec(int64(interval)),
		Value:    unix.NsecToTimespec(int64(interval)),
	}
	if err := unix.TimerfdSettime(d.timer, 0, &spec, nil); err != nil {
		return err
	}
	d.interval = interval
	return nil
}

// StatsInterval returns how often the device asks for statistics, 0 for never.
func (d *Device) StatsInterval() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.interval
}

func (d *Device) setStats(s Stats) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stats = s
}
