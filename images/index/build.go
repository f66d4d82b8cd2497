package index

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"ditto.vm/images/layer"
)

// ErrChanged says that the layer was written while it was being indexed.
var ErrChanged = errors.New("the layer was changed while it was indexed")

// Source is a layer to index: what a guest reads from it.
type Source interface {
	io.ReaderAt
	// Size returns the layer's size in bytes.
	Size() int64
	// Stamp says in what state the layer is.
	Stamp() (layer.Stamp, error)
	// NextData returns the next range at or after off that may hold something
	// but zeros, or io.EOF.
	NextData(off int64) (start, end int64, err error)
}

// Options of [Build]. The zero value is right for most callers.
type Options struct {
	// Workers is the number of hashing goroutines, 0 for one a core.
	Workers int
	// Progress is called, from Build's goroutine, each time a chunk is done:
	// bytes of the layer behind us, and its size.
	Progress func(done, size int64)
}

// Built says what [Build] did.
type Built struct {
	LayerID layer.ID
	Entries uint64
	Read    int64 // bytes read and hashed by this call
	Resumed int64 // bytes that an earlier, interrupted call had done
}

// Build indexes src and puts the index at path, where it appears whole or not
// at all. When ctx ends, or reading fails, what was done is kept beside it and
// the next call goes on from there.
func Build(ctx context.Context, src Source, path string, opts Options) (Built, error) {
	built, err := build(ctx, src, path, opts)
	if err != nil {
		return built, fmt.Errorf("index %s: %w", path, err)
	}
	return built, nil
}

func build(ctx context.Context, src Source, path string, opts Options) (built Built, err error) {
	if src.Size()/layer.BlockSize > maxEntries {
		return built, fmt.Errorf("a layer of %d bytes is too large", src.Size())
	}
	stamp, err := src.Stamp()
	if err != nil {
		return built, err
	}
	t := newTables(src.Size())
	j, err := openJournal(path, stamp, t.add)
	if err != nil {
		return built, err
	}
	defer func() {
		if j != nil {
			err = errors.Join(err, j.keep())
		}
	}()
	built.Resumed = min(j.next*layer.ChunkSize, src.Size())
	built.Read, err = hashAll(ctx, src, j, t, opts)
	if err != nil {
		return built, err
	}
	after, err := src.Stamp()
	if err != nil {
		return built, err
	}
	if d := stamp.Difference(after); d != "" {
		err := fmt.Errorf("%w: %s", ErrChanged, d)
		removeErr := j.remove()
		j = nil
		return built, errors.Join(err, removeErr)
	}
	tail := make([]byte, src.Size()%layer.BlockSize)
	if err := readFull(src, tail, src.Size()-int64(len(tail))); err != nil {
		return built, err
	}
	built.LayerID, built.Entries = t.content.ID(tail), uint64(len(t.digests))
	if err := t.write(path, built.LayerID, stamp); err != nil {
		return built, err
	}
	err = j.remove()
	j = nil
	return built, err
}

// job is a chunk on its way through the workers.
type job struct {
	chunk
	done chan error
}

// hashAll hashes the chunks that the journal lacks, on all workers, and adds
// them to journal and tables in order.
func hashAll(ctx context.Context, src Source, j *journal, t *tables, opts Options) (read int64, err error) {
	workers := opts.Workers
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()

	depth := 2 * workers
	todo, inOrder := make(chan *job, depth), make(chan *job, depth)
	var produceErr error
	wg.Go(func() {
		defer close(todo)
		defer close(inOrder)
		produceErr = chunksOf(src, j.next, func(n int64) bool {
			next := &job{chunk: chunk{n: n}, done: make(chan error, 1)}
			select {
			case inOrder <- next:
			case <-ctx.Done():
				return false
			}
			// Never blocks for long: workers drain it even when cancelled.
			todo <- next
			return true
		})
	})
	for range workers {
		wg.Go(func() {
			buf := make([]byte, layer.ChunkSize)
			for next := range todo {
				if ctx.Err() != nil {
					next.done <- ctx.Err()
					continue
				}
				next.done <- next.load(src, buf)
			}
		})
	}
	for next := range inOrder {
		if err := <-next.done; err != nil {
			return read, err
		}
		if err := ctx.Err(); err != nil {
			return read, err
		}
		if len(next.digests) > 0 {
			if err := errors.Join(j.append(&next.chunk), t.add(&next.chunk)); err != nil {
				return read, err
			}
		}
		end := min((next.n+1)*layer.ChunkSize, src.Size())
		read += end - next.n*layer.ChunkSize
		if opts.Progress != nil {
			opts.Progress(end, src.Size())
		}
	}
	if err := ctx.Err(); err != nil {
		return read, err
	}
	// inOrder is closed, so the producer has set its error.
	if produceErr == nil && opts.Progress != nil {
		opts.Progress(src.Size(), src.Size())
	}
	return read, produceErr
}

// load reads and hashes the chunk.
func (j *job) load(src Source, buf []byte) error {
	off := j.n * layer.ChunkSize
	b := buf[:min(layer.ChunkSize, src.Size()-off)]
	if err := readFull(src, b, off); err != nil {
		return err
	}
	j.hash(j.n, b)
	return nil
}

// chunksOf calls f with the chunks from first on that may hold something, until
// f returns false.
func chunksOf(src Source, first int64, f func(n int64) bool) error {
	whole := src.Size() / layer.BlockSize * layer.BlockSize
	for n := first; n*layer.ChunkSize < whole; {
		start, end, err := src.NextData(n * layer.ChunkSize)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		for n = max(n, start/layer.ChunkSize); n*layer.ChunkSize < min(end, whole); n++ {
			if !f(n) {
				return nil
			}
		}
	}
	return nil
}

// readFull fills p from off.
func readFull(src io.ReaderAt, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	n, err := src.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at %d of the layer: %w", len(p), off, err)
}

// writeFile writes the parts to path by way of a temporary name, durably.
func writeFile(path string, parts ...[]byte) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".tmp-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = tmp.Close()
			_ = os.Remove(tmp.Name())
		}
	}()
	for _, p := range parts {
		if _, err := tmp.Write(p); err != nil {
			return err
		}
	}
	if err := errors.Join(tmp.Chmod(0o644), tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
