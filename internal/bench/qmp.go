package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"time"
)

// qmp talks to a running QEMU (QEMU Machine Protocol).
type qmp struct {
	conn net.Conn
	in   *bufio.Reader
}

// dialQMP connects to the socket that a QEMU is about to make.
func dialQMP(ctx context.Context, path string) (*qmp, error) {
	for {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
		if err == nil {
			q := &qmp{conn, bufio.NewReader(conn)}
			if deadline, ok := ctx.Deadline(); ok {
				_ = conn.SetDeadline(deadline)
			}
			if err := q.do("qmp_capabilities", nil, nil); err != nil {
				return nil, errors.Join(err, conn.Close())
			}
			return q, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("QMP: %w: %w", context.Cause(ctx), err)
		case <-time.After(time.Millisecond):
		}
	}
}

// do executes a command and decodes what it returns, if anybody wants it.
func (q *qmp) do(command string, arguments, result any) error {
	request, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, arguments})
	if err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	if _, err := q.conn.Write(append(request, '\n')); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	for {
		line, err := q.in.ReadBytes('\n')
		if err != nil {
			return fmt.Errorf("QMP %s: %w", command, err)
		}
		var answer struct {
			Return json.RawMessage `json:"return"`
			Error  *struct {
				Desc string `json:"desc"`
			} `json:"error"`
		}
		if err := json.Unmarshal(line, &answer); err != nil {
			return fmt.Errorf("QMP %s: %w: %q", command, err, line)
		}
		switch {
		case answer.Error != nil:
			return fmt.Errorf("QMP %s: %s", command, answer.Error.Desc)
		case answer.Return == nil: // the greeting, or an event
		case result == nil:
			return nil
		default:
			return json.Unmarshal(answer.Return, result)
		}
	}
}

// Close ends the connection.
func (q *qmp) Close() error { return q.conn.Close() }

// fastFile lets migrations to and from files go as fast as QEMU can: pages at
// fixed places of the file, written by several threads.
func (q *qmp) fastFile(channels int) error {
	return q.setMigration(map[string]bool{"mapped-ram": true, "multifd": true},
		map[string]any{"multifd-channels": channels, "max-bandwidth": 0})
}

// setMigration switches capabilities of migrations, and sets parameters.
func (q *qmp) setMigration(capabilities map[string]bool, parameters map[string]any) error {
	type capability struct {
		Name string `json:"capability"`
		On   bool   `json:"state"`
	}
	var list []capability
	for _, name := range slices.Sorted(maps.Keys(capabilities)) {
		list = append(list, capability{name, capabilities[name]})
	}
	if err := q.do("migrate-set-capabilities", map[string]any{"capabilities": list}, nil); err != nil {
		return err
	}
	return q.do("migrate-set-parameters", parameters, nil)
}

// qmpMigration is what QEMU says of a migration.
type qmpMigration struct {
	Status    string  `json:"status"`
	ErrorDesc string  `json:"error-desc"`
	TotalTime float64 `json:"total-time"` // ms
	Downtime  float64 `json:"downtime"`   // ms
	RAM       struct {
		Transferred uint64 `json:"transferred"` // bytes, of multifd too
	} `json:"ram"`
}

// migrated waits for the end of a migration.
func (q *qmp) migrated(ctx context.Context) (m qmpMigration, err error) {
	for {
		m = qmpMigration{}
		if err := q.do("query-migrate", nil, &m); err != nil {
			return m, err
		}
		switch m.Status {
		case "completed":
			return m, nil
		case "failed", "cancelled":
			return m, fmt.Errorf("QEMU: migration %s: %s", m.Status, m.ErrorDesc)
		}
		select {
		case <-ctx.Done():
			return m, context.Cause(ctx)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// running waits until a destination has taken the guest over.
func (q *qmp) running(ctx context.Context) error {
	for {
		var status struct {
			Status string `json:"status"`
		}
		if err := q.do("query-status", nil, &status); err != nil {
			return err
		}
		if status.Status == "running" || status.Status == "paused" {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("QEMU is %s: %w", status.Status, context.Cause(ctx))
		case <-time.After(2 * time.Millisecond):
		}
	}
}
