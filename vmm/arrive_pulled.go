package vmm

import "ditto.vm/migration/live"

// allPulled lets the VM's source go when nothing is missing any more.
func (m *VM) allPulled() {
	if !m.pulled.Done() {
		return
	}
	if source, ok := m.pulled.Source().(live.Arrivals); ok {
		source.Arrived()
	}
}
