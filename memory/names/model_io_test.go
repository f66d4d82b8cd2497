package names

import "ditto.vm/memory"

// begin starts a request.
func (m *model) begin(kind string) {
	if len(m.inFlight) > 5 || m.resizing {
		return
	}
	r := &modelIO{kind: kind, fail: m.rng.IntN(12) == 0}
	r.offset = m.rng.Int64N(int64(len(m.disk))/BlockSize) * BlockSize
	odd := m.rng.IntN(8) == 0
	if odd {
		r.offset += 512 * m.rng.Int64N(8)
	}
	room := int64(len(m.disk)) - r.offset
	for range 1 + m.rng.IntN(3) {
		mem := memory.Range{Start: m.page(), Size: memory.PageSize}
		switch {
		case m.rng.IntN(6) == 0:
			mem.Size *= 2
		case odd && m.rng.IntN(2) == 0, m.rng.IntN(20) == 0:
			mem.Size = 512 * uint64(1+m.rng.IntN(7))
			mem.Start += memory.GPA(512 * m.rng.IntN(8))
		}
		if r.n+int64(mem.Size) > room {
			break
		}
		r.mem, r.n = append(r.mem, mem), r.n+int64(mem.Size)
	}
	if r.n == 0 {
		return
	}
	m.clean(r)
	switch kind {
	case "read":
		m.table.BeginRead(m.layer, r.offset, r.mem)
	case "write":
		m.table.BeginWrite(m.layer, r.offset, r.mem)
	case "erase":
		m.table.BeginErase(m.layer, r.offset, r.n)
	}
	m.inFlight = append(m.inFlight, r)
}

// clean forgets the stores into pages that a request may name: what they made of
// the page is what the request brings to the disk, or is overwritten by it.
func (m *model) clean(r *modelIO) {
	if r.kind == "erase" {
		return
	}
	offset := r.offset
	for _, mem := range r.mem {
		aligned := (uint64(mem.Start)^uint64(offset))%4096 == 0
		for gpa := (mem.Start + 4095) &^ 4095; aligned && gpa+4096 <= mem.End(); gpa += 4096 {
			delete(m.stored, gpa.GFN())
		}
		offset += int64(mem.Size)
	}
}

// progress moves up to n bytes more. Half of the requests move backwards.
func (m *model) progress(r *modelIO, n int64) {
	n = min(n, r.n-r.moved)
	from, to := r.moved, r.moved+n
	if r.offset/512%2 == int64(len(r.mem))%2 {
		from, to = r.n-r.moved-n, r.n-r.moved
	}
	r.moved += n
	if r.kind == "erase" {
		clear(m.disk[r.offset+from : r.offset+to])
		return
	}
	at := int64(0)
	for _, mem := range r.mem {
		lo, hi := max(from, at), min(to, at+int64(mem.Size))
		if lo < hi {
			page, block := m.view(mem.Start+memory.GPA(lo-at), uint64(hi-lo)), m.disk[r.offset+lo:r.offset+hi]
			if r.kind == "read" {
				copy(page, block)
			} else {
				copy(block, page)
			}
		}
		at += int64(mem.Size)
	}
}

func (m *model) end() {
	if len(m.inFlight) == 0 {
		return
	}
	i := m.rng.IntN(len(m.inFlight))
	r := m.inFlight[i]
	m.inFlight = append(m.inFlight[:i], m.inFlight[i+1:]...)
	if !r.fail {
		m.progress(r, r.n)
	}
	switch r.kind {
	case "read":
		for _, mem := range r.mem {
			m.space.Wrote(mem.Start, mem.Size)
		}
		m.table.EndRead(m.layer, r.offset, r.mem, !r.fail)
	case "write":
		m.table.EndWrite(m.layer, r.offset, r.mem, !r.fail)
	case "erase":
		m.table.EndErase(m.layer, r.offset, r.n)
	}
}
