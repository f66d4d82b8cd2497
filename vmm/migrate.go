package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"

	"ditto.vm/images/chain"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/migration/live"
	"ditto.vm/migration/snapshot"
	"ditto.vm/migration/state"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
)

// departure is a VM on its way to another host: the [live.SourceVM].
//
//	Offer   what it is, its disks flushed, so that the other side reads them
//	Begin   the copy begins, all of memory is armed
//	Names   hints: each page is proven by the other side
//	Pause   from here on only the migration lets the guest run again
//	ReleaseDisks   the disks are another's; without ReclaimDisks nothing runs
//	End     what was armed is given back; a guest that stands still stays so
//	Left    it ends, and touches its disks no more
type departure struct {
	copying
	offered live.Offer // what the other side was told
	calls   int        // of Pause, then
	alive   context.Context
	done    func() // undoes Begin; nil when nothing has begun
	disks   departingDisks
}

// standing is a VM that stands still for a migration, until that is decided.
type standing struct {
	decided   chan struct{} // closed then
	committed chan struct{} // closed when it runs elsewhere and its memory is needed here
	closed    bool
}

// errAway is why a VM does not run.
var errAway = fmt.Errorf("its disks were given up for a migration that may have succeeded: make sure that it does not run at the destination, then use 'ditto resume --take-back', or else stop it: %w", api.ErrWrongState)

// MigrationSource returns the VM as a migration takes it. Each is for one
// migration.
func (m *VM) MigrationSource() live.SourceVM {
	d := &departure{copying: copying{m: m}}
	d.disks.d = d
	return d
}

// Offer implements [live.SourceVM].
func (d *departure) Offer(ctx context.Context) (live.Offer, error) {
	m := d.m
	for i := range m.disks {
		if m.disks[i].image.ReadOnly() {
			continue
		}
		if err := m.disks[i].image.Flush(); err != nil {
			return live.Offer{}, err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state != api.Running && m.state != api.Paused {
		return live.Offer{}, fmt.Errorf("migrate: VM is %s: %w", m.state, api.ErrWrongState)
	}
	o, err := m.offer()
	if err != nil {
		return live.Offer{}, err
	}
	d.offered, d.calls = o, m.pauseCalls
	cpus := &cpuSection{cpuid: m.cpuid}
	first := m.vcpus[0]
	if err := first.do(ctx, func() (err error) { cpus.tscKHz, err = first.kvm.TSCKHz(); return err }); err != nil {
		cpus.tscKHz = 0 // not every KVM knows it
	}
	x, err := cpus.message()
	if err != nil {
		return live.Offer{}, err
	}
	o.CPU, err = state.Encode("cpu", x)
	return o, err
}

// offer describes the VM but for its CPUs. Preconditions: mu is held.
func (m *VM) offer() (live.Offer, error) {
	o := live.Offer{
		Name: m.cfg.Name, Ditto: m.version, RAM: m.ramRanges(),
		Untracked: m.tracker.Kind() == memory.TrackerNone, Paused: m.state == api.Paused,
	}
	text, err := m.describe()
	if err != nil {
		return o, err
	}
	if o.Config, err = m.withMACs(text); err != nil {
		return o, err
	}
	sources, err := m.layerSources()
	if err != nil {
		return o, err
	}
	for _, s := range sources {
		o.Layers = append(o.Layers, m.offeredLayer(s))
	}
	return o, nil
}

// withMACs returns a configuration with the addresses that the networks have: the
// other side has another idea of what is usual, under another name.
func (m *VM) withMACs(text json.RawMessage) (json.RawMessage, error) {
	c, err := config.Parse(text)
	if err != nil {
		return nil, err
	}
	for i, n := range presentNets(&c) {
		mac, err := n.HardwareAddr(m.cfg.Name, i)
		if err != nil {
			return nil, err
		}
		n.MAC = mac.String()
	}
	return json.Marshal(c)
}

// offeredLayer says where a layer is in the VM. Preconditions: mu is held.
func (m *VM) offeredLayer(s snapshot.LayerSource) live.Layer {
	l := live.Layer{ID: s.ID, Path: s.Path, Format: s.Format, Size: s.Size, Disk: -1}
	in, ok := s.Source.(*chain.Layer)
	if !ok {
		return l
	}
	for n := range m.disks {
		image := m.disks[n].image
		if depth := slices.Index(image.Layers(), in); depth >= 0 {
			l.Disk, l.Depth, l.Written = n, depth, depth == 0 && !image.ReadOnly()
		}
	}
	return l
}

// Memory implements [live.SourceVM].
func (d *departure) Memory() *memory.Space { return d.m.mem }

// errOther: what was offered is not what is there.
var errOther = errors.New("the VM's disks were changed while it was offered: try again")

// Begin implements [live.SourceVM].
func (d *departure) Begin(ctx context.Context) error {
	m := d.m
	// Who looks at memory with the VM paused has it run again afterwards.
	m.looks.turn.Lock()
	ctx, leave, err := d.copying.begin(ctx)
	m.looks.turn.Unlock()
	if err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	var stop func()
	d.alive, stop = d.whileAlive(ctx)
	d.done = func() {
		stop()
		leave()
	}
	if err := d.begin(); err != nil {
		return errors.Join(err, d.End())
	}
	return nil
}

func (d *departure) begin() error {
	m := d.m
	m.mu.Lock()
	m.leaving = true
	now, err := m.offer()
	m.mu.Unlock()
	if err != nil {
		return err
	}
	if !reflect.DeepEqual(untimed(now), untimed(d.offered)) {
		return errOther
	}
	if now.Untracked {
		m.log.Warn("the guest stands still while it is migrated, since nothing tracks its writes", "tracker", m.tracker.Kind().String(), "cure", "start it with --tracker auto")
		return nil
	}
	return d.arm()
}

// untimed leaves out of an offer what is drawn anew each time: the identities of
// layers without names.
func untimed(o live.Offer) live.Offer {
	o.CPU = state.Section{}
	o.Layers = slices.Clone(o.Layers)
	for i := range o.Layers {
		o.Layers[i].ID = [16]byte{}
	}
	return o
}

// hints are all that the table says, taken for true: each name is proven by the
// other side, and a wrong one costs a digest and a question.
type hints struct{ table names.Recorded }

// Load implements [names.Recorded].
func (h hints) Load(dst []names.Name, gfn memory.GFN) {
	h.table.Load(dst, gfn)
	for i := range dst {
		if dst[i].Kind() == names.Block {
			dst[i] = dst[i].AsProven()
		}
	}
}

// Names implements [live.SourceVM].
func (d *departure) Names(ctx context.Context, progress func(done, total uint64)) (live.Recorded, error) {
	if err := d.ended(); err != nil {
		return nil, err
	}
	m := d.m
	if m.restored != nil {
		m.restored.teach(ctx)
	}
	if m.naming != nil {
		m.naming.CheckIndexes()
	}
	table, layers := m.book()
	pass := names.Pass{
		Space: m.mem, Table: hints{table}, Layers: layers, Running: true, Workers: liveWorkers(), Progress: progress,
	}
	all, err := pass.Run(ctx)
	if err != nil {
		return nil, err
	}
	sources, err := m.layerSources()
	if err != nil {
		return nil, err
	}
	n := &offeredNames{all: all, index: make([]int, len(layers))}
	for i := range n.index {
		n.index[i] = -1
	}
	for i, s := range sources {
		if int(s.Names) < len(n.index) && i < len(d.offered.Layers) {
			n.index[s.Names] = i
		}
	}
	return n, nil
}

// offeredNames are the names of pages by the layers of the offer.
type offeredNames struct {
	all   *names.Map
	index []int // of the offer, by the layer's number in the map; -1 for none
}

// Load implements [live.Recorded].
func (n *offeredNames) Load(dst []names.Name, gfn memory.GFN) {
	for i := range dst {
		dst[i] = n.translate(n.all.At(gfn + memory.GFN(i)))
	}
}

func (n *offeredNames) translate(name names.Name) names.Name {
	if name.Kind() != names.Block {
		return name
	}
	if at := n.index[name.Layer()]; at >= 0 {
		return names.OfBlock(names.LayerID(at), name.Number())
	}
	return 0
}

// Collect implements [live.SourceVM].
func (d *departure) Collect(into *memory.PageSet) error {
	if err := d.ended(); err != nil {
		return err
	}
	mode := memory.Rearm
	d.m.mu.Lock()
	if d.m.standing != nil {
		mode = memory.Peek // nothing is written any more
	}
	d.m.mu.Unlock()
	return d.m.collect(into, mode)
}

// Throttle implements [live.SourceVM].
func (d *departure) Throttle(percent int) { d.m.throttle.set(d.m.vcpus, percent) }

// ended returns why the copy cannot go on.
func (d *departure) ended() error {
	if d.done == nil {
		return errors.New("migrate: nothing has begun")
	}
	if d.alive.Err() != nil {
		return context.Cause(d.alive)
	}
	return nil
}
