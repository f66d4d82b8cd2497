package memory

// noTracker knows nothing: every page counts as written, and names are proven
// by digest alone.
type noTracker struct{ space *Space }

func (t noTracker) Kind() TrackerKind     { return TrackerNone }
func (t noTracker) HostWrite(GPA, uint64) {}
func (t noTracker) Close() error          { return nil }

func (t noTracker) Arm(r Range) error {
	_, err := t.space.locate(r)
	return err
}

func (t noTracker) Disarm(r Range) error   { return t.Arm(r) }
func (t noTracker) Remapped(r Range) error { return t.Arm(r) }

func (t noTracker) Collect(r Range, into *PageSet, _ CollectMode) error {
	if err := t.Arm(r); err != nil {
		return err
	}
	into.Add(r.Start, r.Size)
	return nil
}
