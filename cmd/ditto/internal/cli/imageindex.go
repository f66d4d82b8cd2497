package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/images/chain"
	"ditto.vm/images/index"
	"ditto.vm/images/layer"
)

// imageIndex is an index as JSON.
type imageIndex struct {
	Path         string   `json:"path"`
	Index        string   `json:"index"`
	LayerID      layer.ID `json:"layer_id"`
	LayerBytes   int64    `json:"layer_bytes"`
	Blocks       uint64   `json:"blocks"`
	IndexBytes   int64    `json:"index_bytes"`
	Built        bool     `json:"built"`
	ReadBytes    int64    `json:"read_bytes"`
	ResumedBytes int64    `json:"resumed_bytes"`
	DurMs        int64    `json:"dur_ms"`
}

// indexSamples is how many blocks of a layer are compared with an index that
// looks as if it fit.
const indexSamples = 256

func (e *Env) imageIndexCommand() *cobra.Command {
	var asJSON, check, force bool
	cmd := &cobra.Command{
		Use:   "index FILE",
		Short: "Index what blocks of a disk image hold",
		Long: `Read a disk image and write beside it, as FILE.dittoindex, which blocks hold which
bytes. Machines that use the image then know its blocks in their memory however
they came there. The index takes half a hundredth of what the image stores.

The image may be raw or qcow2. One that is stacked on others is indexed as a guest
reads it through all of them; machines use the indexes of all images of a stack.

Index images that no longer change: base images below others, disks that are
opened read-only, disks that a snapshot has frozen. An image that a machine writes is refused, and an index whose
image was changed is not used by machines; --check tells whether it fits.

An index that fits is left alone. One that was interrupted goes on where it was.`,
		Example: `  ditto image index base.img
  ditto image index --check base.img
  ditto image index web.monday.qcow2
  ditto image index base.img --json | jq .layer_id`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			job, err := openIndexJob(args[0])
			if err != nil {
				return exit.New(exit.Disk, err)
			}
			defer job.close()
			var result imageIndex
			switch result, err = job.existing(); {
			case err == nil && !force:
			case check:
				return exit.Errorf(exit.Disk, "%w; build it anew with: ditto image index %s", err, job.path)
			default:
				if result, err = e.buildIndex(cmd.Context(), job); err != nil {
					return exit.New(exit.Disk, err)
				}
			}
			if asJSON {
				return e.printJSON(result)
			}
			_, err = fmt.Fprintln(e.Stdout, result)
			return err
		},
	}
	addJSON(cmd, &asJSON)
	cmd.Flags().BoolVar(&check, "check", false, "only tell whether the index fits the image; exit code 7 if not")
	cmd.Flags().BoolVar(&force, "force", false, "build it anew even if it fits")
	cmd.MarkFlagsMutuallyExclusive("check", "force")
	return cmd
}

// String says in one line what the index is and what was done.
func (i imageIndex) String() string {
	s := fmt.Sprintf("%s: %d blocks of %s, %s, layer %s", i.Index, i.Blocks, i.Path, humanBytes(uint64(i.IndexBytes)), i.LayerID)
	if !i.Built {
		return s + ": fits"
	}
	if seconds := float64(i.DurMs) / 1000; seconds > 0 {
		s += fmt.Sprintf(", %.1f GB/s", float64(i.ReadBytes)/1e9/seconds)
	}
	if i.ResumedBytes > 0 {
		s += fmt.Sprintf(", the first %s were done already", humanBytes(uint64(i.ResumedBytes)))
	}
	return s
}

// indexJob is an image that is being indexed, as a guest reads it. The image and
// what it is stacked on are locked against writers meanwhile.
type indexJob struct {
	path  string
	image *chain.Chain
	src   *chain.Layer
}

func openIndexJob(path string) (*indexJob, error) {
	image, err := chain.Open(path, chain.Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	return &indexJob{path, image, image.Layers()[0]}, nil
}

// close lets go of the image. It was only read, so nothing can be lost.
func (j *indexJob) close() { _ = j.image.Close() }

// existing describes the index that is there, or says why it cannot be used.
func (j *indexJob) existing() (imageIndex, error) {
	at := index.Beside(j.path)
	x, err := index.Open(at)
	if errors.Is(err, fs.ErrNotExist) {
		return imageIndex{}, fmt.Errorf("%s has no index %s", j.path, at)
	}
	if err != nil {
		return imageIndex{}, err
	}
	defer x.Close()
	if err := x.Check(j.src, indexSamples); err != nil {
		return imageIndex{}, fmt.Errorf("%s: %w", at, err)
	}
	return imageIndex{
		Path: j.path, Index: at, LayerID: x.LayerID(), LayerBytes: x.LayerSize(), Blocks: x.Entries(), IndexBytes: x.FileSize(),
	}, nil
}

// buildIndex builds the index, with a bar on a terminal.
func (e *Env) buildIndex(ctx context.Context, j *indexJob) (imageIndex, error) {
	var o index.Options
	done, size := int64(0), j.src.Size()
	progress := e.newProgress()
	defer progress.close()
	what := "index " + filepath.Base(j.path)
	o.Progress = func(at, _ int64) {
		done = at
		if isTerminal(e.Stderr) {
			progress.Report(what, float64(at)/float64(max(size, 1)))
		}
	}
	began := time.Now()
	built, err := index.Build(ctx, j.src, index.Beside(j.path), o)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return imageIndex{}, fmt.Errorf("interrupted after %s of %s of %s: the same command goes on from there",
			humanBytes(uint64(done)), humanBytes(uint64(size)), j.path)
	}
	if errors.Is(err, index.ErrChanged) {
		return imageIndex{}, fmt.Errorf("%w: index it when nothing writes it", err)
	}
	if err != nil {
		return imageIndex{}, err
	}
	duration := time.Since(began)
	result, err := j.existing()
	if err != nil {
		return imageIndex{}, err
	}
	result.Built, result.ReadBytes, result.ResumedBytes, result.DurMs = true, built.Read, built.Resumed, duration.Milliseconds()
	return result, nil
}
