package live

import (
	"errors"
	"fmt"
	"slices"

	"ditto.vm/memory"
	"ditto.vm/migration/wire"
)

// Limits of an offer.
const (
	maxRanges = 16
	maxRAM    = 1 << 46 // bytes
	maxName   = 256
	maxPath   = 4096
)

// checkOffer refuses what no source sends.
func checkOffer(o Offer) error {
	switch {
	case o.Name == "" || len(o.Name) > maxName:
		return fmt.Errorf("a name of %d bytes", len(o.Name))
	case len(o.RAM) == 0 || len(o.RAM) > maxRanges:
		return fmt.Errorf("%d ranges of memory", len(o.RAM))
	case len(o.Layers) > wire.MaxLayers:
		return fmt.Errorf("%d layers, more than %d", len(o.Layers), wire.MaxLayers)
	}
	if err := checkDisks(&o); err != nil {
		return err
	}
	end := memory.GPA(0)
	for _, r := range o.RAM {
		if r.Start < end || r.Size == 0 || r.Size > maxRAM || r.Start > maxRAM || (uint64(r.Start)|r.Size)%memory.PageSize != 0 {
			return fmt.Errorf("memory of %#x bytes at %s", r.Size, r.Start)
		}
		end = r.End()
	}
	for _, l := range o.Layers {
		if l.Size < 0 || len(l.Path) > maxPath || len(l.Format) > maxName || l.Disk < -1 || l.Depth < 0 {
			return errors.New("a layer that cannot be")
		}
	}
	return nil
}

// sameRanges holds the memory that was made to the offer.
func sameRanges(mem *memory.Space, want []memory.Range) error {
	var got []memory.Range
	for _, r := range mem.Regions() {
		got = append(got, r.Range)
	}
	if !slices.Equal(got, want) {
		return fmt.Errorf("memory was offered at %v and made at %v", want, got)
	}
	return nil
}
