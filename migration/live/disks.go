package live

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"ditto.vm/images/layer"
	"ditto.vm/memory"
	"ditto.vm/migration/wire"
)

// Storage says where the disks are.
type Storage string

// The kinds of storage.
const (
	// StorageProven: both sides see the same files; the destination proves it by
	// a lock that only the source can have set.
	StorageProven Storage = ""
	// StorageShared: the user says so. It is for devices whose locks other hosts
	// do not see.
	StorageShared Storage = "shared"
	// StorageCopied: the destination has its own files. What it lacks is sent.
	StorageCopied Storage = "copy"
)

// Disk is a disk of an offer.
type Disk struct {
	Path     string `json:"path"`
	Format   string `json:"format"`
	Size     int64  `json:"size"` // bytes
	ReadOnly bool   `json:"read_only,omitempty"`
	// Witness is a byte of the file, chosen at random, that the source has locked:
	// who sees the lock sees the same file. 0 for none.
	Witness int64 `json:"witness,omitempty"`
	// Layers are the images that the disk is made of, the top first, for
	// [StorageCopied].
	Layers []DiskLayer `json:"layers,omitempty"`
}

// DiskLayer is an image that others are stacked on.
type DiskLayer struct {
	// ID is by the content that it and all below it make up; zero for the top of a
	// disk that is written.
	ID     layer.ID `json:"id,omitzero"`
	Path   string   `json:"path"`
	Format string   `json:"format"`
	Size   int64    `json:"size"`
}

// Limits of what an offer says of disks.
const (
	maxDisks      = 128
	maxDiskLayers = 128
	maxDiskSize   = 1 << 60 // bytes
)

// checkDisks refuses what no source says of disks.
func checkDisks(o *Offer) error {
	switch {
	case len(o.Disks) > maxDisks:
		return fmt.Errorf("%d disks", len(o.Disks))
	case o.Storage != StorageProven && o.Storage != StorageShared && o.Storage != StorageCopied:
		return fmt.Errorf("storage %.20q is not known here", o.Storage)
	}
	for _, d := range o.Disks {
		if d.Size < 0 || d.Size > maxDiskSize || d.Witness < 0 || len(d.Path) > maxPath || len(d.Format) > maxName || len(d.Layers) > maxDiskLayers {
			return errors.New("a disk that cannot be")
		}
		for _, l := range d.Layers {
			if l.Size < 0 || l.Size > maxDiskSize || len(l.Path) > maxPath || len(l.Format) > maxName {
				return errors.New("a layer of a disk that cannot be")
			}
		}
	}
	return nil
}

// Image is an image that the destination fills, see [wire.Image].
type Image = wire.Image

// Extent is a range of an image.
type Extent struct {
	Offset, Length int64
	Zeros          bool
}

// BlockSource reads the disks of a VM that leaves, while the guest writes them.
// Images are counted as in the list that Arm was given.
type BlockSource interface {
	// Describe adds to the offer what it says of disks. With
	// [StorageCopied] it finds out what layers hold, which may mean to read them.
	Describe(ctx context.Context, o *Offer) error
	// Arm notes what is written from now on, until Disarm. A write that is under
	// way counts as one that follows.
	Arm(images []Image) error
	Disarm()
	// Extents calls visit with what an image holds itself, in ascending order.
	Extents(ctx context.Context, image int, visit func(Extent) error) error
	// ReadBlocks reads the disk, or what the layers of an image make up.
	ReadBlocks(image int, p []byte, offset int64) error
	// CollectBlocks calls visit with what was written since the last call; what
	// is written from now on is collected the next time. In the pause it is
	// complete. What is collected and not sent is lost.
	CollectBlocks(image int, visit func(offset, length int64) error) error
	// WrittenBlocks is how many bytes there are to collect, of all images.
	WrittenBlocks() int64
}

// BlockTarget takes the disks of a VM that arrives. It is complete when
// [Arrival.Construct] has returned: what it wrote is stable then, and has its name.
type BlockTarget interface {
	// Images are those that are wanted, at most [wire.MaxImages].
	Images() []Image
	WriteBlocks(image int, p []byte, offset int64) error
	ZeroBlocks(image int, offset, length int64) error
	// EndImage is called when all of an image came once. It proves one that
	// nobody writes.
	EndImage(ctx context.Context, image int) error
}

// blockChunk is how many bytes of an image travel in a frame, and are read at once.
const blockChunk = wire.MaxPayload

// blockSender sends images of disks on the control connection, in the order in
// which the destination writes them.
//
//	armed -> all that images hold -> proven there -> what was written since, with
//	each round -> the last of it in the pause
type blockSender struct {
	s      *sender
	from   BlockSource
	images []Image
	armed  bool
	buf    []byte
	frame  []byte
}

// describe completes the offer.
func (s *sender) describe() error {
	from := s.vm.Blocks()
	if from == nil {
		if s.o.Disks == StorageCopied {
			return errors.New("this VM's disks cannot be copied: share them")
		}
		return nil
	}
	s.offer.Storage, s.offer.CopyLayers = s.o.Disks, s.o.CopyLayers
	return from.Describe(s.run, &s.offer)
}

// agree learns which images the destination wants.
func (s *sender) agree() error {
	if s.offer.Storage != StorageCopied {
		return nil
	}
	wanted, err := expect[*wire.Images](s.session)
	if err != nil {
		return err
	}
	if err := checkImages(&s.offer, wanted.Images); err != nil {
		return fmt.Errorf("the destination wants images of disks: %w", err)
	}
	s.blocks = &blockSender{s: s, from: s.vm.Blocks(), images: wanted.Images, buf: make([]byte, blockChunk)}
	return nil
}

// checkImages holds what is wanted to what was offered.
func checkImages(o *Offer, images []Image) error {
	for i, image := range images {
		if int(image.Disk) >= len(o.Disks) || slices.Contains(images[:i], image) {
			return fmt.Errorf("%+v cannot be", image)
		}
		d := &o.Disks[image.Disk]
		switch {
		case int(image.Depth) >= len(d.Layers) || image.Floor != wire.NoFloor && int(image.Floor) >= len(d.Layers):
			return fmt.Errorf("%+v of %d layers", image, len(d.Layers))
		case !o.CopyLayers && (image.Depth > 0 || d.ReadOnly):
			return fmt.Errorf("%+v, and layers are not to be copied", image)
		}
	}
	return nil
}

// sendDisks sends what images hold, while the guest runs. Pages that were
// collected by then are sent with all others.
func (s *sender) sendDisks() error {
	b := s.blocks
	if b == nil || len(b.images) == 0 {
		return nil
	}
	s.phase(PhaseDisks)
	b.armed = true
	if err := b.from.Arm(b.images); err != nil {
		return err
	}
	for i := range b.images {
		if err := b.sendImage(i); err != nil {
			return s.cause(err)
		}
	}
	if s.offer.Untracked {
		return nil
	}
	if err := s.vm.Collect(s.dirty); err != nil {
		return s.cause(err)
	}
	s.dirty.Clear()
	return nil
}

// sendImage sends an image once, and waits until it is there.
func (b *blockSender) sendImage(i int) error {
	total := uint64(b.s.offer.Disks[b.images[i].Disk].Size)
	err := b.from.Extents(b.s.run, i, func(e Extent) error {
		for e.Length > 0 {
			n := min(e.Length, blockChunk)
			if e.Zeros {
				n = e.Length
			}
			if err := b.send(i, e.Offset, n, e.Zeros); err != nil {
				return err
			}
			e.Offset, e.Length = e.Offset+n, e.Length-n
			b.s.progress(uint64(e.Offset), total)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := b.s.say(&wire.ImageEnd{Image: uint16(i)}); err != nil {
		return err
	}
	done, err := expectLong[*wire.ImageDone](b.s.session)
	if err == nil && int(done.Image) != i {
		err = fmt.Errorf("the destination ended image %d instead of %d", done.Image, i)
	}
	return err
}

// send sends a range of an image, as it is now. Its zeros travel without bytes.
func (b *blockSender) send(i int, offset, n int64, zero bool) error {
	m := wire.Blocks{Image: uint16(i), Zeros: zero, Offset: uint64(offset), Length: uint64(n)}
	var payload []byte
	if !zero {
		payload = b.buf[:n]
		if err := b.from.ReadBlocks(i, payload, offset); err != nil {
			return fmt.Errorf("copy disk %d: %w", b.images[i].Disk, err)
		}
		if m.Zeros = allZeros(payload); m.Zeros {
			payload = nil
		} else {
			m.Digest = b.s.digests.sum(payload)
		}
	}
	b.frame = wire.AppendBlocks(b.frame[:0], m, len(payload))
	bytes := len(b.frame) + len(payload)
	if !b.s.stopped.Load() {
		if err := b.s.limiter.wait(b.s.run, bytes); err != nil {
			return err
		}
	}
	l := b.s.control
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.write(b.frame); err != nil {
		return lost(err)
	}
	if len(payload) > 0 {
		if err := l.write(payload); err != nil {
			return lost(err)
		}
	}
	b.s.traffic.add(kindDisk, 0, bytes)
	return nil
}

// allZeros reports whether there is nothing but zeros.
func allZeros(b []byte) bool {
	for ; len(b) > layer.BlockSize; b = b[layer.BlockSize:] {
		if !layer.IsZero(b[:layer.BlockSize]) {
			return false
		}
	}
	return layer.IsZero(b)
}

// sendWritten sends what was written to disks since the last time. It comes before
// the pages of a round, which may be named by it.
func (s *sender) sendWritten() error {
	b := s.blocks
	if b == nil {
		return nil
	}
	for i, image := range b.images {
		if image.Depth > 0 {
			continue // nobody writes it
		}
		err := b.from.CollectBlocks(i, func(offset, n int64) error {
			for n > 0 {
				part := min(n, blockChunk)
				if err := b.send(i, offset, part, false); err != nil {
					return err
				}
				offset, n = offset+part, n-part
			}
			return nil
		})
		if err != nil {
			return s.cause(err)
		}
	}
	return nil
}

// diskPages is how much is to be sent of disks, as if it were pages.
func (s *sender) diskPages() uint64 {
	if s.blocks == nil {
		return 0
	}
	return uint64(s.blocks.from.WrittenBlocks()) >> memory.PageShift
}

// disarm ends the noting of writes.
func (s *sender) disarm() {
	if s.blocks != nil && s.blocks.armed {
		s.blocks.armed = false
		s.blocks.from.Disarm()
	}
}

// wantDisks says which images are wanted.
func (r *receiver) wantDisks() error {
	if r.offer.Storage != StorageCopied {
		return nil
	}
	to := r.arrival.Blocks()
	if to == nil {
		return &refusal{errors.New("disks cannot be copied to here")}
	}
	images := to.Images()
	if len(images) > wire.MaxImages {
		return &refusal{fmt.Errorf("%d images of disks are more than %d", len(images), wire.MaxImages)}
	}
	if err := checkImages(&r.offer, images); err != nil {
		return &refusal{fmt.Errorf("images of disks: %w", err)}
	}
	r.images = images
	r.target.Store(&blockTarget{to, images})
	return nil
}

// blockTarget is what the control reader needs to take blocks.
type blockTarget struct {
	to     BlockTarget
	images []Image
}

// takeBlocks writes a range of an image. It runs on the control reader.
func (r *receiver) takeBlocks(f wire.Frame) error {
	m, err := wire.ParseBlocks(f)
	if err != nil {
		return err
	}
	t := r.target.Load()
	switch {
	case t == nil || int(m.Image) >= len(t.images):
		return errors.New("the source sent blocks of a disk that nobody wants")
	case !r.ready() || r.pages.sealed.Load():
		return errors.New("the source sent blocks after the last page")
	}
	if size := r.offer.Disks[t.images[m.Image].Disk].Size; int64(m.Offset+m.Length) > size {
		return fmt.Errorf("the source sent %d bytes at %#x of a disk of %d bytes", m.Length, m.Offset, size)
	}
	r.done.Add(m.Length)
	if m.Zeros {
		return t.to.ZeroBlocks(int(m.Image), int64(m.Offset), int64(m.Length))
	}
	if r.blockBuf == nil {
		r.blockBuf = make([]byte, blockChunk)
	}
	b := r.blockBuf[:f.Payload]
	if err := r.control.in.ReadPayload(b); err != nil {
		return lost(err)
	}
	if r.digests.sum(b) != m.Digest {
		return errors.New("blocks of a disk were damaged on their way: their digest is wrong; is the network sound?")
	}
	return t.to.WriteBlocks(int(m.Image), b, int64(m.Offset))
}

// endImage proves an image, while signs of life go on.
func (r *receiver) endImage(m *wire.ImageEnd) error {
	t := r.target.Load()
	if t == nil || int(m.Image) >= len(t.images) {
		return errors.New("the source ended an image that nobody wants")
	}
	if err := t.to.EndImage(r.run, int(m.Image)); err != nil {
		return r.cause(err)
	}
	return r.say(&wire.ImageDone{Image: m.Image})
}
