package api

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path"
	"strings"
	"time"
)

// Bounds on requests.
const (
	// maxBodyBytes: the largest real body has two dozen bytes.
	maxBodyBytes = 4 << 10
	// defaultGrace is what a stop without a body gives the guest.
	defaultGrace = 30 * time.Second
	maxGrace     = time.Hour
	// memoryTimeout bounds an answer about memory, which may read all of it: a
	// core reads at least 1 GiB a second.
	memoryTimeout = 20 * time.Minute
	memoryPath    = "/v1/vm/memory"
)

// NewHandler returns the API of m. stop is called for a stop request and must
// not wait for the machine.
func NewHandler(m Machine, stop func(grace time.Duration)) http.Handler {
	strict := NewStrictHandlerWithOptions(&operations{m, stop}, nil, StrictHTTPServerOptions{
		RequestErrorHandlerFunc: func(w http.ResponseWriter, _ *http.Request, err error) {
			writeError(w, badRequest("see openapi.yaml", "%s", oneLine(err)))
		},
		ResponseErrorHandlerFunc: func(w http.ResponseWriter, _ *http.Request, err error) {
			writeError(w, asRequestError(err))
		},
	})
	mux := http.NewServeMux()
	HandlerWithOptions(strict, StdHTTPServerOptions{
		BaseRouter: mux,
		ErrorHandlerFunc: func(w http.ResponseWriter, _ *http.Request, err error) {
			writeError(w, badRequest("see openapi.yaml", "%s", oneLine(err)))
		},
	})
	return &router{mux}
}

// router answers what the generated routes do not, in the form of the API, and
// checks bodies before the generated decoder, which ignores unknown and missing
// fields, sees them.
type router struct{ mux *http.ServeMux }

// ServeHTTP implements http.Handler.
func (rt *router) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// The mux would redirect paths that are not clean; nobody has a use for it.
	if _, pattern := rt.mux.Handler(r); pattern == "" || path.Clean(r.URL.Path) != r.URL.Path {
		writeError(w, rt.noRoute(r))
		return
	}
	if err := checkBody(w, r); err != nil {
		writeError(w, err)
		return
	}
	if strings.HasPrefix(r.URL.Path, memoryPath) {
		// It fails only where there is no connection, in tests.
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(memoryTimeout))
	}
	rt.mux.ServeHTTP(w, r)
}

func (rt *router) noRoute(r *http.Request) *RequestError {
	for _, method := range []string{http.MethodGet, http.MethodPut} {
		if method == r.Method {
			continue
		}
		other := r.Clone(r.Context())
		other.Method = method
		if _, pattern := rt.mux.Handler(other); pattern != "" {
			return &RequestError{http.StatusMethodNotAllowed, Error{Code: MethodNotAllowed,
				Message: fmt.Sprintf("%.16q is not allowed here", r.Method), Hint: "use " + method}}
		}
	}
	return &RequestError{http.StatusNotFound, Error{Code: NotFound, Message: "there is nothing at this path", Hint: "see openapi.yaml"}}
}

// bodyFields names the fields of each request that has a body, and whether the
// body must be there.
func bodyFields(urlPath string) (fields []string, required bool) {
	switch urlPath {
	case "/v1/vm/stop":
		return []string{"grace_ms"}, false
	case "/v1/vm/balloon":
		return []string{"target_bytes"}, true
	case "/v1/vm/disk-size":
		return []string{"disk", "size_bytes"}, true
	case "/v1/vm/console-size":
		return []string{"columns", "rows"}, true
	}
	return nil, false
}

// checkBody bounds the body, and accepts exactly the object that the
// specification describes. It leaves the body readable.
func checkBody(w http.ResponseWriter, r *http.Request) *RequestError {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBodyBytes))
	if err != nil {
		return badRequest(fmt.Sprintf("send at most %d bytes", maxBodyBytes), "the body cannot be read: %s", oneLine(err))
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	names, required := bodyFields(r.URL.Path)
	if r.Method != http.MethodPut || len(names) == 0 {
		if len(body) > 0 {
			return badRequest("send none", "this request takes no body")
		}
		return nil
	}
	if len(body) == 0 && !required {
		return nil
	}
	hint := fmt.Sprintf(`send {"%s": NUMBER}`, strings.Join(names, `": NUMBER, "`))
	var fields map[string]*uint64
	decoder := json.NewDecoder(bytes.NewReader(body))
	if err := decoder.Decode(&fields); err != nil || decoder.More() {
		return badRequest(hint, "the body is not an object of numbers")
	}
	for _, name := range names {
		if fields[name] == nil {
			return badRequest(hint, "the body lacks %s", name)
		}
	}
	if len(fields) != len(names) {
		return badRequest(hint, "the body has other fields than %s", strings.Join(names, " and "))
	}
	return nil
}

// operations implements [StrictServerInterface].
type operations struct {
	machine Machine
	stop    func(grace time.Duration)
}

func (o *operations) GetInfo(context.Context, GetInfoRequestObject) (GetInfoResponseObject, error) {
	info := o.machine.Info()
	if info.Devices == nil {
		info.Devices = []Device{}
	}
	return GetInfo200JSONResponse(info), nil
}

func (o *operations) GetStats(context.Context, GetStatsRequestObject) (GetStatsResponseObject, error) {
	stats, err := o.machine.Stats()
	if err != nil {
		return nil, err
	}
	if stats.Devices == nil {
		stats.Devices = []DeviceStats{}
	}
	for i := range stats.Devices {
		if stats.Devices[i].Counters == nil {
			stats.Devices[i].Counters = map[string]uint64{}
		}
	}
	if stats.Exits == nil {
		stats.Exits = map[string]uint64{}
	}
	if stats.Frames.Reasons == nil {
		stats.Frames.Reasons = map[string]uint64{}
	}
	if stats.Names.Counters == nil {
		stats.Names.Counters = map[string]uint64{}
	}
	return GetStats200JSONResponse(stats), nil
}

func (o *operations) Pause(ctx context.Context, _ PauseRequestObject) (PauseResponseObject, error) {
	return Pause204Response{}, o.machine.Pause(ctx)
}

func (o *operations) Resume(ctx context.Context, _ ResumeRequestObject) (ResumeResponseObject, error) {
	return Resume204Response{}, o.machine.Resume(ctx)
}

func (o *operations) TakeBack(ctx context.Context, _ TakeBackRequestObject) (TakeBackResponseObject, error) {
	return TakeBack204Response{}, o.machine.TakeBack(ctx)
}

func (o *operations) PressPowerButton(context.Context, PressPowerButtonRequestObject) (PressPowerButtonResponseObject, error) {
	return PressPowerButton204Response{}, o.machine.PowerButton()
}

func (o *operations) Stop(_ context.Context, request StopRequestObject) (StopResponseObject, error) {
	grace := defaultGrace
	if request.Body != nil {
		if ms := request.Body.GraceMs; ms < 0 || ms > maxGrace.Milliseconds() {
			return nil, badRequest(fmt.Sprintf("use 0 to %d", maxGrace.Milliseconds()), "grace_ms %d is out of range", ms)
		}
		grace = time.Duration(request.Body.GraceMs) * time.Millisecond
	}
	o.stop(grace)
	return Stop202Response{}, nil
}

func (o *operations) Kill(context.Context, KillRequestObject) (KillResponseObject, error) {
	o.machine.Kill()
	return Kill202Response{}, nil
}

func (o *operations) GetBalloon(context.Context, GetBalloonRequestObject) (GetBalloonResponseObject, error) {
	balloon, err := o.machine.Balloon()
	if err != nil {
		return nil, err
	}
	if balloon.Guest == nil {
		balloon.Guest = map[string]uint64{}
	}
	return GetBalloon200JSONResponse(balloon), nil
}

func (o *operations) SetBalloon(_ context.Context, request SetBalloonRequestObject) (SetBalloonResponseObject, error) {
	target := request.Body.TargetBytes
	if memory := o.machine.Info().MemoryBytes; target > memory {
		return nil, badRequest("leave the guest some", "target_bytes %d is more than the machine's %d", target, memory)
	}
	return SetBalloon204Response{}, o.machine.SetBalloon(target)
}

func (o *operations) SetDiskSize(_ context.Context, request SetDiskSizeRequestObject) (SetDiskSizeResponseObject, error) {
	return SetDiskSize204Response{}, o.machine.ResizeDisk(request.Body.Disk, request.Body.SizeBytes)
}

func (o *operations) SetConsoleSize(_ context.Context, request SetConsoleSizeRequestObject) (SetConsoleSizeResponseObject, error) {
	o.machine.ConsoleResize(request.Body.Columns, request.Body.Rows)
	return SetConsoleSize204Response{}, nil
}

func (o *operations) ListForwards(context.Context, ListForwardsRequestObject) (ListForwardsResponseObject, error) {
	forwards := o.machine.Forwards()
	if forwards == nil {
		forwards = []Forward{}
	}
	return ListForwards200JSONResponse(forwards), nil
}

func (o *operations) GetMetrics(context.Context, GetMetricsRequestObject) (GetMetricsResponseObject, error) {
	stats, err := o.machine.Stats()
	if err != nil {
		return nil, err
	}
	return GetMetrics200TextResponse(formatMetrics(o.machine.Info(), stats)), nil
}
