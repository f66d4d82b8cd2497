package balloon

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"ditto.vm/devices/virtio"
	"ditto.vm/memory"
)

// maxPages bounds the page numbers of one chain. Linux sends at most 256.
const maxPages = 4096

// errRequest is wrapped when a chain is against virtio 1.2 5.5.6.
var errRequest = errors.New("malformed balloon request")

// checkPages says what is wrong with a chain of page numbers.
func checkPages(c *virtio.Chain) error {
	if len(c.Writable) > 0 || c.ReadableBytes%4 != 0 || c.ReadableBytes > 4*maxPages {
		return fmt.Errorf("%w: %d writable buffers, %d bytes of page numbers", errRequest, len(c.Writable), c.ReadableBytes)
	}
	return nil
}

// sortPages decodes page numbers into pages[:0] and sorts them, so that runs
// can be discarded at once: a driver allocates pages in any order.
func sortPages(pages []uint32, p []byte) []uint32 {
	pages = pages[:0]
	for ; len(p) >= 4; p = p[4:] {
		pages = append(pages, binary.LittleEndian.Uint32(p))
	}
	slices.Sort(pages)
	return pages
}

// nextRun takes the first run of consecutive numbers off sorted pages. Numbers
// that stand more than once count once.
func nextRun(pages []uint32) (run memory.Range, rest []uint32) {
	first, last := pages[0], pages[0]
	i := 1
	for ; i < len(pages) && (pages[i] == last || pages[i] == last+1 && last+1 != 0); i++ {
		last = pages[i]
	}
	return memory.Range{
		Start: memory.GPA(first) * PageSize,
		Size:  (uint64(last-first) + 1) * PageSize,
	}, pages[i:]
}
