package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/lab/wire"
)

// agentArg makes this program the agent; errorsEnv tells it what failed before.
const (
	agentArg  = "agent"
	errorsEnv = "DITTO_LAB_INIT_ERRORS"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == agentArg {
		if err := runAgent(); err != nil {
			fmt.Fprintln(os.Stderr, "lab agent:", err)
			os.Exit(1)
		}
		return
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "this is process 1 of ditto's emulated host; see ditto-lab --help")
		os.Exit(2)
	}
	if err := boot(); err != nil {
		fmt.Fprintln(os.Stderr, "lab init:", err)
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {} // process 1 must not end
}

// boot sets the machine up and reaps until the agent ends.
func boot() error {
	setup := &setup{}
	if err := setup.run(); err != nil {
		return err
	}
	failed, err := json.Marshal(setup.errors)
	if err != nil {
		return err
	}
	agent := exec.Command("/proc/self/exe", agentArg)
	agent.Stdout, agent.Stderr = os.Stderr, os.Stderr
	agent.Env = []string{errorsEnv + "=" + string(failed)}
	if err := agent.Start(); err != nil {
		return fmt.Errorf("start the agent: %w", err)
	}
	return reap(agent.Process.Pid)
}

// reap collects every child that ends until the process pid does. It is the
// only one to wait for children, so that nothing is waited for twice.
func reap(pid int) error {
	for {
		var status unix.WaitStatus
		got, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait: %w", err)
		case got == pid:
			if status.Signaled() || status.ExitStatus() != 0 {
				return fmt.Errorf("the agent ended with status %#x", uint32(status))
			}
			return nil
		}
	}
}

func readConfig() (wire.Config, error) {
	var cfg wire.Config
	b, err := os.ReadFile(wire.ConfigPath)
	if err != nil {
		return cfg, err
	}
	if err := json.Unmarshal(b, &cfg); err != nil {
		return cfg, fmt.Errorf("%s: %w", wire.ConfigPath, err)
	}
	return cfg, nil
}
