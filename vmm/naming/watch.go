package naming

import "ditto.vm/images/layer"

// watchedFile is what the file system said of a layer when nobody wrote it any
// more.
type watchedFile struct {
	file  *layer.File // of a file that was loaded; nil for an image
	stamp layer.Stamp
	bad   bool
}

// watch remembers the state of an immutable layer. One whose state cannot be
// read names nothing. Preconditions: mu is held.
func (n *Naming) watch(s *source, file *layer.File) {
	s.watch = &watchedFile{file: file}
	var err error
	if s.watch.stamp, err = s.stamp(); err != nil {
		s.watch.bad = true
		n.distrust(s, err.Error())
	}
}

// unwatch forgets it: the layer is written again. Preconditions: mu is held.
func (n *Naming) unwatch(s *source) { s.watch = nil }

// checkFiles drops the names of immutable layers that changed, and reports
// whether there are any. A proof is about the bytes of its day.
func (n *Naming) checkFiles() (changed bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range n.sources {
		if s.watch == nil || s.watch.bad || s.retired {
			continue
		}
		now, err := s.stamp()
		why := s.watch.stamp.Difference(now)
		if err != nil {
			why = err.Error()
		}
		if why != "" {
			s.watch.bad, changed = true, true
			n.distrust(s, why)
		}
	}
	return changed
}

// distrust takes a layer out of use, and says so.
func (n *Naming) distrust(s *source, why string) {
	n.table.DropBeyond(s.id, 0)
	n.log.Warn("memory is not named after this file any more; restart the machine to do so again", "image", s.path, "err", why)
}
