// Package material is what tests and benchmarks boot: Debian's kernels, the
// u-root image and a Debian root file system. It is fetched or made once, on a
// machine with a network; inside the lab, which has none, it is found in the
// cache.
//
//	make test --> ditto-lab prepare --> Prepare --> ~/.cache/ditto
//	                                                    |
//	tests in the lab, benchmarks <-- Kernel, URoot, Debian
package material

import (
	"context"
	"fmt"

	"ditto.vm/guest"
	"ditto.vm/images/debian"
	"ditto.vm/images/kernel"
	"ditto.vm/images/rootfs"
	"ditto.vm/images/uroot"
)

// CloudKernel is the kernel that most guests boot: small, with virtio_pci and
// ext4 built in.
const CloudKernel = "6.12-cloud"

// KernelSpecs are all kernels that the tests boot.
func KernelSpecs() []string { return []string{CloudKernel, "6.12", "6.1-cloud", "6.1"} }

// debianOptions describe the one Debian disk that tests and benchmarks share:
// the tools that load a guest, and a kernel of its own for kexec.
func debianOptions(progress debian.Progress) rootfs.Options {
	return rootfs.Options{
		Packages: []string{"fio", "iperf3", "stress-ng", "iproute2"},
		Kernel:   "linux-image-cloud-amd64",
		Progress: progress,
	}
}

// Debian returns the Debian disk. Copy it before a guest writes to it.
func Debian(ctx context.Context, progress debian.Progress) (*rootfs.Image, error) {
	return rootfs.Debian(ctx, debianOptions(progress))
}

// Kernel returns a kernel, fetched if it is not cached.
func Kernel(ctx context.Context, spec string, progress debian.Progress) (kernel.Kernel, error) {
	return kernel.NewStore("", progress).Ensure(ctx, spec)
}

// URoot returns the u-root image for a kernel.
func URoot(ctx context.Context, k kernel.Kernel) (*uroot.Image, error) {
	source, err := guest.InitSource()
	if err != nil {
		return nil, err
	}
	return uroot.Build(ctx, uroot.Options{Kernel: k, Init: source})
}

// Prepare fetches and makes all of it.
func Prepare(ctx context.Context, progress debian.Progress) error {
	for _, spec := range KernelSpecs() {
		k, err := Kernel(ctx, spec, progress)
		if err != nil {
			return fmt.Errorf("kernel %s: %w", spec, err)
		}
		if _, err := URoot(ctx, k); err != nil {
			return fmt.Errorf("u-root image for %s: %w", spec, err)
		}
	}
	if _, err := Debian(ctx, progress); err != nil {
		return fmt.Errorf("Debian disk: %w", err)
	}
	return nil
}
