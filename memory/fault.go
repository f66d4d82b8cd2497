package memory

import "sync"

// sharedFault is the userfaultfd of a Space, open as long as somebody uses it.
type sharedFault struct {
	mu    sync.Mutex // guards fd and users; taken after remaps.mu
	fd    *userfault
	users int
	// writes says that all of memory is registered for tracking writes, and that
	// new mappings must be. It is guarded by remaps.mu.
	writes bool
}

// openFault opens the Space's userfaultfd for one more user.
func (s *Space) openFault() (*userfault, error) {
	f := &s.fault
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd == nil {
		fd, err := openUserfault()
		if err != nil {
			return nil, err
		}
		f.fd = fd
	}
	f.users++
	return f.fd, nil
}

// closeFault is called once by each user. With the last of them everything is
// unregistered and disarmed.
func (s *Space) closeFault() error {
	s.remaps.mu.Lock()
	defer s.remaps.mu.Unlock()
	f := &s.fault
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.users--; f.users > 0 {
		return nil
	}
	fd := f.fd
	f.fd, f.writes = nil, false
	return fd.close()
}

// trackWrites registers all of memory for tracking writes, if that is not done
// yet. The caller has the userfaultfd open.
func (s *Space) trackWrites() error {
	s.remaps.mu.Lock()
	defer s.remaps.mu.Unlock()
	if s.fault.writes {
		return nil
	}
	// What is registered already must get both modes at once.
	if m := s.missing.Load(); m != nil {
		if err := m.registerAll(uffdRegisterModeMissing | uffdRegisterModeWP); err != nil {
			return err
		}
	}
	s.fault.writes = true
	for i := range s.regions {
		r := &s.regions[i]
		if err := s.registerWrites(part{region: r, index: i, Range: r.Range}); err != nil {
			return err
		}
	}
	return nil
}

// registerWrites registers a part of memory for tracking writes, if all of it is.
//
// Preconditions: remaps.mu is held for writing.
func (s *Space) registerWrites(p part) error {
	if !s.fault.writes || p.Size == 0 {
		return nil
	}
	s.fault.mu.Lock()
	fd := s.fault.fd
	s.fault.mu.Unlock()
	return fd.register(p.hva(p.Start), uintptr(p.Size), uffdRegisterModeWP)
}
