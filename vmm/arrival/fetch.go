package arrival

import (
	"errors"

	"ditto.vm/memory"
)

// nothing has no pages.
type nothing struct{}

// ReadPages implements memory.PageSource.
func (nothing) ReadPages(_ memory.GFN, dst []byte) error {
	clear(dst)
	return nil
}

// Row implements memory.PageSource.
func (nothing) Row(gfn memory.GFN) memory.Range {
	return memory.Range{Start: gfn.GPA(), Size: memory.PageSize}
}

// CanFetch reports why a guest's memory cannot be fetched when it is touched on
// this host, by this process (post-copy). It tries it.
func CanFetch() error {
	space, err := memory.New(memory.Config{Size: 2 << 20})
	if err != nil {
		return err
	}
	waiting := space.NewPageSet()
	waiting.Add(0, memory.PageSize)
	missing, err := space.OpenMissing(nothing{}, waiting, memory.MissingOptions{})
	if err == nil {
		err = missing.Close()
	}
	return errors.Join(err, space.Close())
}
