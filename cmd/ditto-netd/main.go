// The resolver is Go's own: libc's would load plug-ins that the sandbox hides.
//
//go:debug netdns=go

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/netd"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run is main without the process: it returns the exit code.
func run(args []string, stdout, stderr io.Writer) int {
	config, err := netd.ParseArgs(args, stdout)
	if errors.Is(err, flag.ErrHelp) {
		return netd.ExitOK
	}
	status := stdout
	if err == nil && config.StatusFD != 1 {
		file := os.NewFile(uintptr(config.StatusFD), "status")
		if file == nil {
			err = fmt.Errorf("--status-fd %d: not a descriptor", config.StatusFD)
		} else {
			defer func() { _ = file.Close() }()
			unix.CloseOnExec(config.StatusFD)
			status = file
		}
	}
	level := slog.LevelInfo
	if config.Verbose {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level})).With("dev", "netd")
	if err != nil {
		return fail(log, status, netd.ExitUsage, err)
	}
	captureLibraryLog(log)

	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	if err := serve(ctx, config, status, log); err != nil {
		var start *netd.StartError
		if errors.As(err, &start) {
			return fail(log, status, start.Code, err)
		}
		log.Error("the network failed", "err", err)
		return netd.ExitFailure
	}
	return netd.ExitOK
}

// fail reports an error before the network was ready, to the parent and to
// the log, and returns the exit code.
func fail(log *slog.Logger, status io.Writer, code int, err error) int {
	if werr := netd.WriteStatus(status, netd.Status{Error: err.Error(), Code: code}); werr != nil {
		log.Error("the status line has no reader", "err", werr)
	}
	log.Error("cannot start", "err", err)
	return code
}

// serve sets the network up, says so on status, and serves the peer until it
// closes the socket or ctx ends. An error before the network is ready is a
// [*netd.StartError].
func serve(ctx context.Context, config netd.Config, status io.Writer, log *slog.Logger) error {
	addresses, err := netd.AddressesOf(config.Subnet)
	if err != nil {
		return &netd.StartError{Code: netd.ExitUsage, Text: err.Error()}
	}
	peer, err := openPeer(config)
	if err != nil {
		return &netd.StartError{Code: netd.ExitFailure, Text: err.Error()}
	}
	defer peer.close()
	forwards, err := listenTCP(config.Forwards)
	if err != nil {
		return err
	}
	defer forwards.close()
	if !config.NoSandbox {
		if err := dropRights(); err != nil {
			return &netd.StartError{Code: netd.ExitFailure, Text: err.Error()}
		}
	}
	network, err := newNetwork(config, addresses)
	if err != nil {
		return err
	}
	forwards.serve(network, addresses.Guest, log)

	ready := netd.Status{Ready: true, Addresses: addresses, MTU: config.MTU, Forwards: names(forwards, config.Forwards)}
	if err := netd.WriteStatus(status, ready); err != nil {
		return fmt.Errorf("write the status line: %w", err)
	}
	if file, ok := status.(*os.File); ok && file != os.Stdout {
		_ = file.Close()
	}
	log.Info("ready", "subnet", config.Subnet, "forwards", ready.Forwards)

	stop := context.AfterFunc(ctx, peer.close)
	defer stop()
	conn, err := peer.accept()
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	err = network.AcceptQemu(ctx, newGuard(conn, log))
	if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, unix.ECONNRESET) || ctx.Err() != nil {
		log.Info("the VM closed the socket")
		return nil
	}
	return err
}

// names returns the forwards as the status line says them: TCP with the port
// that was chosen, UDP as asked.
func names(tcp forwardSet, wanted []netd.Forward) []string {
	var names []string
	for _, f := range tcp {
		names = append(names, f.String())
	}
	for _, f := range wanted {
		if f.Proto == "udp" {
			names = append(names, f.String())
		}
	}
	return names
}
