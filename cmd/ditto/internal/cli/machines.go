package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/registry"
)

// answerTimeout is how long a machine may take to answer a question.
const answerTimeout = 5 * time.Second

// find returns the running machine name. The error tells which ones do run.
func find(r *registry.Registry, name string) (registry.VM, error) {
	vm, err := r.Find(name)
	if err == nil {
		return vm, nil
	}
	if !errors.Is(err, registry.ErrNotRunning) {
		return vm, err
	}
	if last, err := r.LastExit(name); err == nil && last.Reason == "migrated" {
		return vm, exit.Errorf(exit.NotFound, "%s does not run here: it went to %s at %s", name, last.Where, last.Time.Local().Format(time.DateTime))
	}
	running, _ := names(r)
	hint := "none is; start one with ditto run"
	if len(running) > 0 {
		hint = "running: " + strings.Join(running, ", ")
	}
	return vm, exit.Errorf(exit.NotFound, "no machine %q is running (%s)", name, hint)
}

func names(r *registry.Registry) ([]string, error) {
	vms, err := r.List()
	if err != nil {
		return nil, err
	}
	out := make([]string, 0, len(vms))
	for _, vm := range vms {
		out = append(out, vm.Name)
	}
	return out, nil
}

// dial connects to the control socket of a machine.
func (e *Env) dial(name string) (*registry.Registry, registry.VM, *api.Remote, error) {
	r, err := e.Registry()
	if err != nil {
		return nil, registry.VM{}, nil, err
	}
	vm, err := find(r, name)
	if err != nil {
		return nil, vm, nil, err
	}
	remote, err := api.Dial(vm.APISocket())
	return r, vm, remote, err
}

// completeRunning completes the names of running machines, each once.
func (e *Env) completeRunning(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	r, err := e.Registry()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	running, err := names(r)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return without(running, args), cobra.ShellCompDirectiveNoFileComp
}

func without(all, taken []string) []string {
	var left []string
	for _, name := range all {
		used := false
		for _, t := range taken {
			used = used || t == name
		}
		if !used {
			left = append(left, name)
		}
	}
	return left
}

// completeOne is completeRunning for commands that take one name.
func (e *Env) completeOne(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return e.completeRunning(cmd, args, word)
}

// forEach does one thing to each machine named and joins what failed.
func (e *Env) forEach(ctx context.Context, args []string, do func(context.Context, *registry.Registry, registry.VM, *api.Remote) error) error {
	var failed []error
	for _, name := range args {
		r, vm, remote, err := e.dial(name)
		if err == nil {
			err = do(ctx, r, vm, remote)
			remote.Close()
		}
		if err != nil && len(args) > 1 {
			err = fmt.Errorf("%s: %w", name, err)
		}
		failed = append(failed, err)
	}
	return errors.Join(failed...)
}
