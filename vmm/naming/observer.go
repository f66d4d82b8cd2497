package naming

import (
	"ditto.vm/devices/virtio/blk"
	"ditto.vm/images/chain"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// DiskObserver tells the table of one disk's I/O. It implements [blk.Observer].
type DiskObserver struct {
	naming *Naming
	table  *names.Table
	chain  *chain.Chain
	// layer is the top's number, which changes while nothing is in flight. below
	// are those of the tops before.
	layer names.LayerID
	below []names.LayerID
}

// Layer returns the number of the disk's top in the table.
func (d *DiskObserver) Layer() names.LayerID { return d.layer }

// BeforeRead implements [blk.Observer].
func (d *DiskObserver) BeforeRead(io *blk.IO) { d.tell(io, beforeRead, false) }

// AfterRead implements [blk.Observer].
func (d *DiskObserver) AfterRead(io *blk.IO, err error) { d.tell(io, afterRead, err == nil) }

// BeforeWrite implements [blk.Observer].
func (d *DiskObserver) BeforeWrite(io *blk.IO) { d.tell(io, beforeWrite, false) }

// AfterWrite implements [blk.Observer].
func (d *DiskObserver) AfterWrite(io *blk.IO, err error) { d.tell(io, afterWrite, err == nil) }

// BeforeErase implements [blk.Observer].
func (d *DiskObserver) BeforeErase(offset, n int64) {
	if n > 0 {
		d.table.BeginErase(d.layer, offset, n)
	}
}

// AfterErase implements [blk.Observer].
func (d *DiskObserver) AfterErase(offset, n int64, _ error) {
	if n > 0 {
		d.table.EndErase(d.layer, offset, n)
	}
}

// Resize says that the disk has size bytes from now on: call it before it is cut
// short, and after it has grown.
func (d *DiskObserver) Resize(size int64) { d.table.DropBeyond(d.layer, size) }

// moment is one of the four calls about a request.
type moment int

const (
	beforeRead moment = iota
	afterRead
	beforeWrite
	afterWrite
)

// batch is how many buffers are told at once, from the stack. A request in
// several batches is as good as several requests that are in flight together.
const batch = 32

// tell tells the table of a request, batch after batch.
func (d *DiskObserver) tell(io *blk.IO, when moment, done bool) {
	offset := io.Offset
	for buffers := io.Buffers; len(buffers) > 0; {
		var space [batch]memory.Range
		mem := space[:min(len(buffers), batch)]
		size := int64(0)
		for i := range mem {
			b := &buffers[i]
			mem[i] = memory.Range{Start: b.GPA, Size: uint64(len(b.Data))}
			size += int64(len(b.Data))
		}
		switch when {
		case beforeRead:
			d.table.BeginRead(d.layer, offset, mem)
		case afterRead:
			d.table.EndRead(d.layer, offset, mem, done)
		case beforeWrite:
			d.table.BeginWrite(d.layer, offset, mem)
		case afterWrite:
			d.table.EndWrite(d.layer, offset, mem, done)
		}
		offset, buffers = offset+size, buffers[len(mem):]
	}
}
