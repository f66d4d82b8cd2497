package chain

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"ditto.vm/images/disk"
	"ditto.vm/images/qcow2"
)

// RebaseOptions say how to stack an overlay on another image.
type RebaseOptions struct {
	// Format of the image below, found by its content if Probe.
	Format Format
	// Unsafe changes only what the overlay says it is stacked on, which need not
	// be there. The overlay reads as it did only if the other image does.
	Unsafe bool
	// Progress hears how many bytes of the disk are done, if not nil.
	Progress func(done, total int64)
}

// Rebase stacks the overlay at path on the image below, or on none if that is
// "". The overlay reads as before: it gets what the two images differ in. Nobody
// may have it open. Until that is done it is stacked on what it was.
func Rebase(ctx context.Context, path, below string, o RebaseOptions) (err error) {
	var base view
	name := ""
	if below != "" {
		if name, err = backingName(path, below); err != nil {
			return &disk.Error{Path: path, Err: err, Reason: "cannot name its backing file: " + err.Error(), Cure: "check the paths"}
		}
		if o.Format == Probe {
			if o.Format, err = probe(below); err != nil {
				return fmt.Errorf("the format of %s must be said: %w", below, err)
			}
		}
		if sameFile(path, below) {
			return &disk.Error{Path: path, Reason: "cannot be stacked on itself", Cure: "name another image"}
		}
		if !o.Unsafe {
			c, err := Open(below, Options{ReadOnly: true, Format: o.Format, AnyLength: true})
			if err != nil {
				return err
			}
			defer func() { _ = c.Close() }() // it was only read
			for _, l := range c.Layers() {
				if sameFile(path, l.Path()) {
					return &disk.Error{Path: path, Reason: "is below " + below, Cure: "name an image that is not stacked on it"}
				}
			}
			base.top = c.top()
		}
	} else {
		o.Format = Probe
	}
	top, err := openQcow2(path, Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, top.close()) }()
	if !o.Unsafe {
		if err := top.keep(ctx, base, o.Progress); err != nil {
			return fmt.Errorf("rebase %s: %w", path, err)
		}
	}
	if err := top.image.Close(); err != nil {
		return fmt.Errorf("rebase %s: %w", path, err)
	}
	return named(qcow2.SetBackingFile(top.file, name, string(o.Format)), path)
}

// sameFile reports whether two paths lead to one file.
func sameFile(a, b string) bool {
	var x, y unix.Stat_t
	return unix.Stat(a, &x) == nil && unix.Stat(b, &y) == nil && x.Dev == y.Dev && x.Ino == y.Ino
}

// view is an image as an overlay of size bytes sees it: zeros go on behind its
// end, or are all there is without one.
type view struct {
	top  *Layer
	size int64
}

// Size implements qcow2.Backing.
func (v view) Size() int64 { return v.size }

// ReadAtv implements qcow2.Backing.
func (v view) ReadAtv(bufs [][]byte, offset int64) error {
	for _, b := range bufs {
		n := 0
		if v.top != nil {
			n = int(max(0, min(int64(len(b)), v.top.Size()-offset)))
		}
		if n > 0 {
			if err := v.top.ReadAtv([][]byte{b[:n]}, offset); err != nil {
				return err
			}
		}
		clear(b[n:])
		offset += int64(len(b))
	}
	return nil
}

// find tells where bytes are.
func (v view) find(offset, n int64) (Extent, error) {
	if v.top == nil {
		return Extent{Kind: qcow2.Zero, Length: n}, nil
	}
	e, _, err := v.top.search(offset, n, true)
	return e, err
}

// alike returns for how many bytes from offset on two images surely read alike,
// since both have them in the same place or have zeros, or 0 and for how many
// that is open.
func alike(a, b view, offset, n int64) (same, open int64, err error) {
	x, err := a.find(offset, n)
	if err != nil {
		return 0, 0, err
	}
	y, err := b.find(offset, x.Length)
	if err != nil {
		return 0, 0, err
	}
	n = min(x.Length, y.Length)
	if x.Kind == qcow2.Zero && y.Kind == qcow2.Zero ||
		x.Kind == qcow2.Data && y.Kind == qcow2.Data && x.Host == y.Host && x.Layer.same(y.Layer) {
		return n, 0, nil
	}
	return 0, n, nil
}

// keep copies to an overlay what it shows of the image below and would not show
// of another one.
func (l *Layer) keep(ctx context.Context, base view, progress func(done, total int64)) error {
	name, format := l.backing()
	old := view{size: l.Size()}
	base.size = old.size
	if name != "" {
		path, err := l.resolve(name, format)
		if err != nil {
			return err
		}
		c, err := Open(path, Options{ReadOnly: true, Format: format, AnyLength: true})
		if err != nil {
			return fmt.Errorf("below %s: %w", l.Path(), err)
		}
		defer func() { _ = c.Close() }() // it was only read
		old.top = c.top()
	}
	l.image.SetBacking(old)
	h := l.image.Header()
	r := rebasing{l: l, old: old, base: base, cluster: h.ClusterSize()}
	r.was, r.becomes = make([]byte, max(mergeChunk, r.cluster)), make([]byte, max(mergeChunk, r.cluster))
	for at := int64(0); at < old.size; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		e, _, err := l.lookup(at, min(old.size-at, int64(len(r.was))), true)
		if err == nil && e.Kind == qcow2.Unallocated {
			err = r.copy(at, e.Length)
		}
		if err != nil {
			return err
		}
		if at += e.Length; progress != nil {
			progress(at, old.size)
		}
	}
	return l.flush()
}

// rebasing is one run of keep.
type rebasing struct {
	l            *Layer
	old, base    view
	cluster      int64
	was, becomes []byte
}

// copy deals with a row of clusters that the overlay has not.
func (r *rebasing) copy(at, n int64) error {
	for done := int64(0); done < n; {
		same, open, err := alike(r.old, r.base, at+done, n-done)
		if err != nil {
			return err
		}
		if open == 0 {
			done += same
			continue
		}
		// Whole clusters, whatever is known of the rest of the last.
		start := done &^ (r.cluster - 1)
		done = min(n, (done+open+r.cluster-1)&^(r.cluster-1))
		if err := r.compare(at+start, done-start); err != nil {
			return err
		}
	}
	return nil
}

// compare reads clusters from both images and writes those that differ.
func (r *rebasing) compare(at, n int64) error {
	was, becomes := r.was[:n], r.becomes[:n]
	if err := r.old.ReadAtv([][]byte{was}, at); err != nil {
		return err
	}
	if err := r.base.ReadAtv([][]byte{becomes}, at); err != nil {
		return err
	}
	for i := int64(0); i < n; i += r.cluster {
		b := was[i:min(n, i+r.cluster)]
		if string(b) == string(becomes[i:][:len(b)]) {
			continue
		}
		var err error
		if zeroes(b) {
			err = r.l.writeZeroes(at+i, int64(len(b)), true)
		} else {
			err = r.l.writeAtv([][]byte{b}, at+i, false)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
