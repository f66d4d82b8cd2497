package chain

import (
	"context"
	"errors"
	"io"

	"ditto.vm/images/qcow2"
)

// Own is a range of a disk.
type Own struct {
	Offset, Length int64
	// Zeros says that the range reads as zeros, whatever is below.
	Zeros bool
}

// Own calls visit, in ascending order, with what the layers from the one at depth
// (0 is the top) down to the one above floor hold themselves; a floor behind the
// last is the end of the chain. What they leave out reads as the floor, or as
// zeros where there is none. The disk may be written meanwhile.
func (c *Chain) Own(ctx context.Context, depth, floor int, visit func(Own) error) error {
	layers := c.Layers()
	depths := make(map[*Layer]int, len(layers))
	for i, l := range layers {
		depths[l] = i
	}
	above := floor < len(layers)
	from := layers[depth]
	for at := int64(0); at < from.Size(); {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		e, err := from.find(at, from.Size()-at)
		if err != nil {
			return err
		}
		next := at + e.Length
		if e.Layer != nil && depths[e.Layer] < floor {
			err = e.own(at, above, visit)
		}
		if err != nil {
			return err
		}
		at = next
	}
	return nil
}

// own calls visit with the parts of an extent that are worth telling: above
// another layer zeros are.
func (e *Extent) own(at int64, above bool, visit func(Own) error) error {
	if e.Kind == qcow2.Zero {
		if !above {
			return nil
		}
		return visit(Own{at, e.Length, true})
	}
	if e.Layer.image != nil {
		return visit(Own{at, e.Length, false})
	}
	// A raw file has holes of its own, and nothing below.
	for end := at + e.Length; at < end; {
		from, to, err := e.Layer.file.NextData(at)
		if errors.Is(err, io.EOF) || err == nil && from >= end {
			return nil
		}
		if err != nil {
			return err
		}
		from, to = max(from, at), min(to, end)
		if err := visit(Own{from, to - from, false}); err != nil {
			return err
		}
		at = to
	}
	return nil
}

// SetWitness is [disk.Raw.SetWitness] of the top's file.
func (c *Chain) SetWitness(at int64) error { return c.top().file.SetWitness(at) }

// SeesWitness is [disk.Raw.SeesWitness] of the top's file.
func (c *Chain) SeesWitness(at int64) bool { return c.top().file.SeesWitness(at) }
