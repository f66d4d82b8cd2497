package remotemigrate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"ditto.vm/vmm/lend"
)

// handOver is the name of the operation that hands out what another process of
// this host goes on with.
const handOver = "hand-over"

// Belongings are what a machine has on this host and keeps when another process
// goes on with it. The files are copies: the machine runs on until it migrates.
type Belongings struct {
	// Lock is of its name.
	Lock *os.File
	// Memory are the files of its memory, none if that has to be copied.
	Memory []*os.File
}

// Close closes all that is there.
func (b *Belongings) Close() error {
	var errs []error
	for _, f := range b.files() {
		errs = append(errs, f.Close())
	}
	*b = Belongings{}
	return errors.Join(errs...)
}

func (b *Belongings) files() (files []*os.File) {
	if b.Lock != nil {
		files = append(files, b.Lock)
	}
	return append(files, b.Memory...)
}

// belongingsMessage says which files come.
type belongingsMessage struct {
	Memory int `json:"memory"`
}

// HandOver is the operation by which a machine's process hands out what own
// returns.
func HandOver(own func() (*Belongings, error)) map[string]lend.Operation {
	return map[string]lend.Operation{handOver: func(_ context.Context, s *lend.Session, _ json.RawMessage) (any, error) {
		b, err := own()
		if err != nil {
			return nil, fmt.Errorf("hand over: %w", err)
		}
		s.Give(b.files()...)
		return belongingsMessage{Memory: len(b.Memory)}, nil
	}}
}

// CallHandOver asks the machine whose socket for operations is at path for what
// another process goes on with. The caller closes it.
func CallHandOver(ctx context.Context, path string) (*Belongings, error) {
	var files []*os.File
	var m belongingsMessage
	client := lend.Client{
		Kinds: Kinds(),
		Answer: func(context.Context, string, json.RawMessage) (any, []*os.File, error) {
			return nil, nil, lend.ErrProtocol
		},
		Given: func(given []*os.File) { files = given },
	}
	err := client.Call(ctx, path, handOver, struct{}{}, &m)
	b := &Belongings{}
	if err == nil {
		err = b.take(m, files)
	}
	if err != nil {
		for _, f := range files {
			_ = f.Close() // the error is what counts
		}
		return nil, err
	}
	return b, nil
}

// take tells the files apart.
func (b *Belongings) take(m belongingsMessage, files []*os.File) error {
	if m.Memory < 0 || len(files) != 1+m.Memory {
		return fmt.Errorf("%w: %d descriptors for a lock and %d files of memory", lend.ErrProtocol, len(files), m.Memory)
	}
	b.Lock, b.Memory = files[0], files[1:]
	return nil
}
