package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"ditto.vm/internal/material"
)

// newPrepareCommand fetches and makes what tests and benchmarks boot.
func newPrepareCommand(stderr io.Writer) *cobra.Command {
	return &cobra.Command{
		Use:   "prepare",
		Short: "Fetch and make what the tests boot: kernels, u-root images, a Debian disk",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			ctx, cancel := signalContext(context.Background())
			defer cancel()
			return material.Prepare(ctx, &textProgress{w: stderr})
		},
	}
}
