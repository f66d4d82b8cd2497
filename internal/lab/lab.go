package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/u-root/u-root/pkg/cpio"

	"ditto.vm/images/cache"
	"ditto.vm/internal/lab/wire"
)

// MaxRuns is how many commands can run at once in one lab.
const MaxRuns = 8

// Mount points in the lab.
const (
	ScratchDir = wire.ScratchDir // ext4 on a disk of its own
	ShareDir   = wire.ShareDir   // Lab.ShareDir of the host
	DiskDir    = wire.DiskDir    // links to Options.Disks: disk0, disk1, ...
)

// EnvInside is set to "1" for everything that runs in a lab.
const EnvInside = "DITTO_LAB"

// bootLimit bounds a boot. A healthy one takes 5 s, on a loaded machine 30.
const bootLimit = 3 * time.Minute

// powerOffLimit bounds an orderly end before QEMU is killed.
const powerOffLimit = 20 * time.Second

// ErrDead says that the lab ended while it was needed.
var ErrDead = errors.New("the lab is gone")

// Lab is a running emulated host.
type Lab struct {
	opts Options
	log  *slog.Logger
	tmp  *tempDir
	vm   *machine

	idle  chan *port // ports that run nothing
	conns []net.Conn // of the ports, and then of the ticks

	ticking sync.WaitGroup

	closeOnce sync.Once
	closeErr  error

	mu       sync.Mutex
	programs map[string]identity // programs run so far, by path
	copies   int                 // copies made in the share
}

// port is one stream to the agent.
type port struct {
	conn *wire.Conn
	run  uint32 // number of the current or last run
}

// Start boots an emulated host. It returns when commands can be run.
func Start(ctx context.Context, opts Options) (_ *Lab, err error) {
	o, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	c, err := prepare(ctx, o)
	if err != nil {
		return nil, err
	}
	root := o.CacheDir
	if root == "" {
		root = cache.Dir()
	}
	l := &Lab{opts: o, log: o.Log, programs: map[string]identity{}, idle: make(chan *port, MaxRuns)}
	if l.tmp, err = newTempDir(filepath.Join(root, "lab", "running")); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = l.release()
		}
	}()
	cfg := wire.Config{Hostname: "lab", ModulesRoot: c.modulesRoot, THP: o.THP, KVMGroup: kvmGroup()}
	if err := l.makeFiles(ctx, cfg, c.modules); err != nil {
		return nil, err
	}
	args := qemuArgs(o, c.image, l.tmp.join("initrd"), l.tmp.join("scratch"), l.tmp.join("share"), l.tmp.join("console"), MaxRuns)
	if l.vm, l.conns, err = startQEMU(args, MaxRuns+1); err != nil {
		return nil, err
	}
	ticks := l.conns[MaxRuns]
	l.ticking.Go(func() { l.tick(ticks) })
	if err := l.awaitReady(ctx); err != nil {
		return nil, err
	}
	l.log.Info("lab is up", "kernel", c.kernel.Version, "dur", time.Since(begin))
	return l, nil
}

// makeFiles makes the initramfs, the scratch disk and the share.
func (l *Lab) makeFiles(ctx context.Context, cfg wire.Config, modules string) error {
	if err := os.Mkdir(l.tmp.join("share"), 0o755); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if err := buildInit(ctx, l.tmp.join("init")); err != nil {
		return err
	}
	program, err := os.ReadFile(l.tmp.join("init"))
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	text, err := json.Marshal(cfg)
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	err = writeCPIO(l.tmp.join("initrd"), []cpio.Record{
		cpio.Directory("dev", 0o755),
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.StaticFile("init", string(program), 0o755),
		cpio.StaticFile(strings.TrimPrefix(wire.ConfigPath, "/"), string(text), 0o644),
	})
	if err != nil {
		return fmt.Errorf("lab: initramfs: %w", err)
	}
	if err := appendFile(l.tmp.join("initrd"), modules); err != nil {
		return fmt.Errorf("lab: initramfs: %w", err)
	}
	return makeScratch(ctx, l.tmp.join("scratch"), l.opts.DiskBytes)
}

// makeScratch makes a sparse file with an empty ext4 file system.
func makeScratch(ctx context.Context, path string, size int64) error {
	mkfs, err := lookTool("mkfs.ext4")
	if err != nil {
		return err
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if err := os.Truncate(path, size); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	cmd := exec.CommandContext(ctx, mkfs, "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", path)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("lab: mkfs.ext4: %w: %s", err, out)
	}
	return nil
}

func appendFile(dst, src string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		_ = out.Close()
		return err
	}
	return out.Close()
}

// kvmGroup returns the id of the group kvm, or -1.
func kvmGroup() int {
	g, err := user.LookupGroup("kvm")
	if err != nil {
		return -1
	}
	id, err := strconv.Atoi(g.Gid)
	if err != nil {
		return -1
	}
	return id
}

// awaitReady waits for the agent's greeting on every port.
func (l *Lab) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.vm.kill() })
	defer stop()
	for i, conn := range l.conns[:MaxRuns] {
		p := &port{conn: wire.NewConn(conn)}
		f, err := p.conn.Read()
		if err != nil {
			if ctx.Err() != nil {
				return fmt.Errorf("lab: boot: %w%s", ctx.Err(), l.consoleTail())
			}
			return fmt.Errorf("lab: boot: %w%s", l.deathCause(), l.consoleTail())
		}
		var hello wire.Hello
		if f.Type != wire.Ready {
			return fmt.Errorf("lab: boot: the agent sent a frame of type %d", f.Type)
		}
		if err := json.Unmarshal(f.Payload, &hello); err != nil {
			return fmt.Errorf("lab: boot: %w", err)
		}
		if i == 0 {
			for _, msg := range hello.Errors {
				l.log.Warn("lab set-up", "err", msg)
			}
		}
		l.idle <- p
	}
	return nil
}

// tick keeps the machine awake (see [wire.TickPort]) until its stream is closed.
func (l *Lab) tick(conn net.Conn) {
	timer := time.NewTicker(wire.TickInterval)
	defer timer.Stop()
	for range timer.C {
		if _, err := conn.Write([]byte{0}); err != nil {
			return
		}
	}
}

// deathCause waits for QEMU, whose streams have ended, and says why it ended.
func (l *Lab) deathCause() error {
	ctx, cancel := context.WithTimeout(context.Background(), powerOffLimit)
	defer cancel()
	if !l.vm.wait(ctx) {
		return ErrDead
	}
	return fmt.Errorf("%w: %w", ErrDead, l.vm.err)
}

// consoleLines is how much of the kernel's log an error shows.
const consoleLines = 25

// consoleTail returns the end of the kernel's log, ready to be appended to an
// error.
func (l *Lab) consoleTail() string {
	b, err := os.ReadFile(l.ConsolePath())
	if err != nil || len(bytes.TrimSpace(b)) == 0 {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(b), "\r", "")), "\n")
	if len(lines) > consoleLines {
		lines = lines[len(lines)-consoleLines:]
	}
	return "\nlast lines of its console:\n  " + strings.Join(lines, "\n  ")
}

// ConsolePath is the file with the kernel's log. It goes with the lab.
func (l *Lab) ConsolePath() string { return l.tmp.join("console") }

// ShareDir is the folder of this machine that the lab sees, uncached and
// writable, as [ShareDir]. It goes with the lab.
func (l *Lab) ShareDir() string { return l.tmp.join("share") }

// Kill cuts the power: the machine stops at once, in the middle of what it
// does. [Options.Disks] keep what had been written to them. Close is still
// needed.
func (l *Lab) Kill() { l.vm.kill() }

// Done is closed when the machine has ended.
func (l *Lab) Done() <-chan struct{} { return l.vm.done }

// Close ends the lab and removes everything temporary. If the caller's disks
// are in it, they are unmounted first.
func (l *Lab) Close() error {
	l.closeOnce.Do(func() {
		if len(l.opts.Disks) > 0 {
			l.powerOff()
		}
		l.closeErr = l.release()
	})
	return l.closeErr
}

// powerOff asks the agent to unmount and switch off.
func (l *Lab) powerOff() {
	ctx, cancel := context.WithTimeout(context.Background(), powerOffLimit)
	defer cancel()
	select {
	case p := <-l.idle:
		if p.conn.Write(wire.PowerOff, 0, nil) == nil && !l.vm.wait(ctx) {
			l.log.Warn("lab did not switch off")
		}
	case <-l.vm.done:
	default: // every port is busy with a command that will not end
	}
}

// release ends QEMU and removes what belongs to the lab.
func (l *Lab) release() error {
	if l.vm != nil {
		l.vm.kill()
	}
	closeAll(l.conns)
	l.ticking.Wait()
	return l.tmp.remove()
}
