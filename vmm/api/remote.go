package api

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"
)

// maxResponseHeaderBytes bounds what a client reads from a socket that is not
// ditto's.
const maxResponseHeaderBytes = 64 << 10

// Remote is a machine in another process, reached through its socket. Failures
// that the machine reports are of type [RequestError].
type Remote struct {
	client *ClientWithResponses
	http   *http.Client
}

// Dial returns the machine behind the control socket at path. It connects when
// it is first used.
func Dial(path string) (*Remote, error) {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
		MaxIdleConns:           1,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxResponseHeaderBytes,
	}
	httpClient := &http.Client{Transport: transport}
	client, err := NewClientWithResponses("http://ditto", WithHTTPClient(httpClient))
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return &Remote{client, httpClient}, nil
}

// Close drops the connection.
func (r *Remote) Close() { r.http.CloseIdleConnections() }

// failure turns a response that is not the expected one into an error.
func failure(status int, body *Error) error {
	if body == nil {
		return fmt.Errorf("control socket: unexpected answer with status %d: is it ditto's?", status)
	}
	return &RequestError{Status: status, Body: *body}
}

// Info returns what the machine is.
func (r *Remote) Info(ctx context.Context) (Info, error) {
	response, err := r.client.GetInfoWithResponse(ctx)
	if err != nil {
		return Info{}, err
	}
	if response.JSON200 == nil {
		return Info{}, failure(response.StatusCode(), response.JSONDefault)
	}
	return *response.JSON200, nil
}

// Stats returns the machine's counters.
func (r *Remote) Stats(ctx context.Context) (Stats, error) {
	response, err := r.client.GetStatsWithResponse(ctx)
	if err != nil {
		return Stats{}, err
	}
	if response.JSON200 == nil {
		return Stats{}, failure(response.StatusCode(), response.JSONDefault)
	}
	return *response.JSON200, nil
}

// Balloon returns the balloon's state.
func (r *Remote) Balloon(ctx context.Context) (Balloon, error) {
	response, err := r.client.GetBalloonWithResponse(ctx)
	if err != nil {
		return Balloon{}, err
	}
	if response.JSON200 == nil {
		return Balloon{}, failure(response.StatusCode(), response.JSONDefault)
	}
	return *response.JSON200, nil
}

// Forwards returns the host ports that lead into the guest.
func (r *Remote) Forwards(ctx context.Context) ([]Forward, error) {
	response, err := r.client.ListForwardsWithResponse(ctx)
	if err != nil {
		return nil, err
	}
	if response.JSON200 == nil {
		return nil, failure(response.StatusCode(), response.JSONDefault)
	}
	return *response.JSON200, nil
}

// Metrics returns the counters in the Prometheus text format.
func (r *Remote) Metrics(ctx context.Context) (string, error) {
	response, err := r.client.GetMetricsWithResponse(ctx)
	if err != nil {
		return "", err
	}
	if response.StatusCode() != http.StatusOK {
		return "", failure(response.StatusCode(), response.JSONDefault)
	}
	return string(response.Body), nil
}

// Pause stops the machine's vCPUs.
func (r *Remote) Pause(ctx context.Context) error {
	response, err := r.client.PauseWithResponse(ctx)
	if err != nil {
		return err
	}
	return done(response.StatusCode(), response.JSONDefault)
}

// Resume lets the machine run on.
func (r *Remote) Resume(ctx context.Context) error {
	response, err := r.client.ResumeWithResponse(ctx)
	if err != nil {
		return err
	}
	return done(response.StatusCode(), response.JSONDefault)
}

// TakeBack lets the machine run on though its migration is in doubt.
func (r *Remote) TakeBack(ctx context.Context) error {
	response, err := r.client.TakeBackWithResponse(ctx)
	if err != nil {
		return err
	}
	return done(response.StatusCode(), response.JSONDefault)
}

// PowerButton presses the power button.
func (r *Remote) PowerButton(ctx context.Context) error {
	response, err := r.client.PressPowerButtonWithResponse(ctx)
	if err != nil {
		return err
	}
	return done(response.StatusCode(), response.JSONDefault)
}

// Stop has the machine stopped. It returns when that has begun.
func (r *Remote) Stop(ctx context.Context, grace time.Duration) error {
	response, err := r.client.StopWithResponse(ctx, StopRequest{GraceMs: grace.Milliseconds()})
	if err != nil {
		return err
	}
	return done(response.StatusCode(), response.JSONDefault)
}

// Kill has the machine ended at once. It returns when that has begun.
func (r *Remote) Kill(ctx context.Context) error {
	response, err := r.client.KillWithResponse(ctx)
	if err != nil {
		return err
	}
	return done(response.StatusCode(), response.JSONDefault)
}

// SetBalloon asks the guest for memory.
func (r *Remote) SetBalloon(ctx context.Context, bytes uint64) error {
	response, err := r.client.SetBalloonWithResponse(ctx, BalloonTarget{TargetBytes: bytes})
	if err != nil {
		return err
	}
	return done(response.StatusCode(), response.JSONDefault)
}

// ResizeDisk changes the size of the nth disk; a smaller one loses its end.
func (r *Remote) ResizeDisk(ctx context.Context, n int, bytes uint64) error {
	response, err := r.client.SetDiskSizeWithResponse(ctx, DiskSize{Disk: n, SizeBytes: bytes})
	if err != nil {
		return err
	}
	return done(response.StatusCode(), response.JSONDefault)
}

// ResizeConsole tells the guest the size of the terminal, in characters.
func (r *Remote) ResizeConsole(ctx context.Context, columns, rows uint16) error {
	response, err := r.client.SetConsoleSizeWithResponse(ctx, ConsoleSize{Columns: columns, Rows: rows})
	if err != nil {
		return err
	}
	return done(response.StatusCode(), response.JSONDefault)
}

// done accepts an answer without a body.
func done(status int, body *Error) error {
	if status == http.StatusNoContent || status == http.StatusAccepted {
		return nil
	}
	return failure(status, body)
}
