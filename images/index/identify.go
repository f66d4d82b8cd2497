package index

import (
	"context"
	"errors"
	"fmt"

	"ditto.vm/images/layer"
)

// Identify returns a layer's identity by content, for which it reads all of it
// that is not a hole, without making an index.
func Identify(ctx context.Context, src Source) (layer.ID, error) {
	before, err := src.Stamp()
	if err != nil {
		return layer.ID{}, err
	}
	size := src.Size()
	content, buf := layer.NewContentHasher(size), make([]byte, layer.ChunkSize)
	var j job
	var failed error
	err = chunksOf(src, 0, func(n int64) bool {
		if failed = context.Cause(ctx); failed != nil {
			return false
		}
		j.n = n
		if failed = j.load(src, buf); failed != nil {
			return false
		}
		content.Chunk(n, j.all())
		return true
	})
	if err := errors.Join(err, failed); err != nil {
		return layer.ID{}, err
	}
	tail := make([]byte, src.Size()%layer.BlockSize)
	if err := readFull(src, tail, src.Size()-int64(len(tail))); err != nil {
		return layer.ID{}, err
	}
	after, err := src.Stamp()
	if err != nil {
		return layer.ID{}, err
	}
	if d := before.Difference(after); d != "" {
		return layer.ID{}, fmt.Errorf("%w: %s", ErrChanged, d)
	}
	return content.ID(tail), nil
}
