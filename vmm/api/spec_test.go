package api

import (
	"bytes"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// loadSpec reads openapi.yaml and returns a router over it.
func loadSpec(t testing.TB) (*openapi3.T, routers.Router) {
	t.Helper()
	data, err := os.ReadFile("openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	spec, err := openapi3.NewLoader().LoadFromData(data)
	if err != nil {
		t.Fatal(err)
	}
	if err := spec.Validate(t.Context()); err != nil {
		t.Fatal(err)
	}
	router, err := legacy.NewRouter(spec)
	if err != nil {
		t.Fatal(err)
	}
	return spec, router
}

// do answers one request in memory.
func do(h http.Handler, method, path, body string) *httptest.ResponseRecorder {
	request := httptest.NewRequest(method, "http://ditto"+path, strings.NewReader(body))
	if body != "" {
		request.Header.Set("Content-Type", "application/json")
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, request)
	return w
}

// checkResponse holds a response against the specification.
func checkResponse(t testing.TB, router routers.Router, method, path string, w *httptest.ResponseRecorder) {
	t.Helper()
	request := httptest.NewRequest(method, "http://ditto"+path, http.NoBody)
	route, params, err := router.FindRoute(request)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	err = openapi3filter.ValidateResponse(t.Context(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: &openapi3filter.RequestValidationInput{Request: request, Route: route, PathParams: params},
		Status:                 w.Code,
		Header:                 w.Header(),
		Body:                   io.NopCloser(bytes.NewReader(w.Body.Bytes())),
		Options:                &openapi3filter.Options{IncludeResponseStatus: true},
	})
	if err != nil {
		t.Errorf("%s %s: %d %s: %v", method, path, w.Code, w.Body, err)
	}
}

// TestResponsesFitSpec calls every operation of the specification, when the
// machine succeeds and when it fails, and validates what comes back.
func TestResponsesFitSpec(t *testing.T) {
	spec, router := loadSpec(t)
	bodies := map[string]string{"setBalloon": `{"target_bytes": 4096}`, "stop": `{"grace_ms": 10}`, "setConsoleSize": `{"columns": 80, "rows": 25}`, "setDiskSize": `{"disk": 0, "size_bytes": 4096}`}
	for _, fail := range []error{nil, ErrWrongState, ErrNotSupported, io.ErrUnexpectedEOF} {
		m := newFake()
		m.fail = fail
		h := NewHandler(m, func(time.Duration) {})
		for path, item := range spec.Paths.Map() {
			for method, operation := range item.Operations() {
				w := do(h, method, path, bodies[operation.OperationID])
				checkResponse(t, router, method, path, w)
				if fail == nil && w.Code >= 300 {
					t.Errorf("%s %s: %d %s", method, path, w.Code, w.Body)
				}
			}
		}
	}
}

func TestBadRequests(t *testing.T) {
	_, router := loadSpec(t)
	m := newFake()
	h := NewHandler(m, func(time.Duration) { t.Error("stopped by a bad request") })
	for _, test := range []struct {
		method, path, body string
		status             int
	}{
		{"PUT", "/v1/vm/balloon", "", 400},
		{"PUT", "/v1/vm/balloon", "{}", 400},
		{"PUT", "/v1/vm/balloon", "null", 400},
		{"PUT", "/v1/vm/balloon", `{"target_bytes": null}`, 400},
		{"PUT", "/v1/vm/balloon", `{"target_bytes": -1}`, 400},
		{"PUT", "/v1/vm/balloon", `{"target_bytes": "1"}`, 400},
		{"PUT", "/v1/vm/balloon", `{"target_byte": 1}`, 400},
		{"PUT", "/v1/vm/balloon", `{"target_bytes": 1, "x": 1}`, 400},
		{"PUT", "/v1/vm/balloon", `{"target_bytes": 1}{}`, 400},
		{"PUT", "/v1/vm/balloon", strings.Repeat(" ", maxBodyBytes+1), 400},
		{"PUT", "/v1/vm/stop", `{"grace_ms": 3600001}`, 400},
		{"PUT", "/v1/vm/stop", `{"grace_ms": 1e400}`, 400},
		{"PUT", "/v1/vm/stop", `[]`, 400},
		{"PUT", "/v1/vm/console-size", `{"columns": 80}`, 400},
		{"PUT", "/v1/vm/console-size", `{"columns": 80, "rows": 65536}`, 400},
		{"PUT", "/v1/vm/disk-size", `{"size_bytes": 4096}`, 400},
		{"PUT", "/v1/vm/disk-size", `{"disk": -1, "size_bytes": 4096}`, 400},
		{"PUT", "/v1/vm/pause", `{}`, 400},
		{"GET", "/v1/vm", `{}`, 400},
		{"GET", "/v1/vm/memory?mode=deep", "", 400},
		{"GET", "/v1/vm/memory?pause=maybe", "", 400},
		{"GET", "/v1/vm/memory?mode=full&mode=quick", "", 400},
		{"GET", "/v1/vm/memory/map?mode=%20", "", 400},
		{"PUT", "/v1/vm/memory", "", 405},
		{"GET", "/v1/vm/memory/map/", "", 404},
		{"GET", "/v1/vm/pause", "", 405},
		{"POST", "/v1/vm/stats", "", 405},
		{"GET", "/", "", 404},
		{"GET", "/v1/vm/../vm", "", 404},
		{"PUT", "/v2/vm", "", 404},
	} {
		w := do(h, test.method, test.path, test.body)
		if w.Code != test.status || w.Header().Get("Content-Type") != "application/json" {
			t.Errorf("%s %s %.60s: %d %s, want %d", test.method, test.path, test.body, w.Code, w.Body, test.status)
		}
		if test.status == 400 {
			checkResponse(t, router, test.method, test.path, w)
		}
	}
	if len(m.calls) != 0 {
		t.Errorf("bad requests reached the machine: %v", m.calls)
	}
}

func TestStopWithoutBody(t *testing.T) {
	var got time.Duration
	h := NewHandler(newFake(), func(grace time.Duration) { got = grace })
	if w := do(h, "PUT", "/v1/vm/stop", ""); w.Code != 202 || got != defaultGrace {
		t.Errorf("%d, grace %s", w.Code, got)
	}
}

// TestMetricsFormat reads the metrics with Prometheus's own parser and linter.
func TestMetricsFormat(t *testing.T) {
	m := newFake()
	stats, _ := m.Stats()
	text := formatMetrics(m.Info(), stats)
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	exits := families["ditto_vm_exits_total"].GetMetric()
	if len(exits) != 2 || exits[0].GetCounter().GetValue() != 1<<60 || exits[0].GetLabel()[0].GetValue() != `we"b` {
		t.Errorf("exits: %v", exits)
	}
	if got := families["ditto_vm_uptime_seconds"].GetMetric()[0].GetGauge().GetValue(); got != 1.5 {
		t.Errorf("uptime %v", got)
	}
	for name, want := range map[string]map[string]float64{
		"ditto_vm_tracker":           {"wp-async": 1},
		"ditto_vm_frames":            {"large": 2, "small": 1, "empty": 0},
		"ditto_vm_small_frames":      {"balloon": 1},
		"ditto_vm_restore_bytes":     {"mapped": 5, "copied": 6, "missing": 7},
		"ditto_vm_named_pages":       {"named": 7, "named_proven": 6},
		"ditto_vm_name_events_total": {"refuted": 1},
	} {
		got := map[string]float64{}
		for _, sample := range families[name].GetMetric() {
			for _, label := range sample.GetLabel() {
				if label.GetName() != "vm" {
					got[label.GetValue()] = sample.GetGauge().GetValue() + sample.GetCounter().GetValue()
				}
			}
		}
		if !maps.Equal(got, want) {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	if got := len(families["ditto_vm_device_events_total"].GetMetric()); got != 2 {
		t.Errorf("%d device counters in\n%s", got, text)
	}
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil || len(problems) != 0 {
		t.Errorf("%v, %v", problems, err)
	}
}

// FuzzHandler sends arbitrary requests: the server must answer each with a
// status of the API and, when it fails, with an error body that fits the
// specification.
func FuzzHandler(f *testing.F) {
	for _, seed := range [][3]string{
		{"GET", "/v1/vm", ""}, {"PUT", "/v1/vm/stop", `{"grace_ms": 5}`}, {"PUT", "/v1/vm/balloon", `{"target_bytes": 1e3}`},
		{"PUT", "/v1/vm/pause", ""}, {"PUT", "/v1/vm/console-size", `{"columns": 1, "rows": 2}`}, {"DELETE", "/metrics", "x"}, {"GET", "/v1/vm/memory?mode=full&pause=true", ""}, {"GET", "/v1/vm/memory/map?mode=%zz&pause", ""}, {"GET", "//v1//vm", ""}, {"GET", "/v1/vm/forwards?x=%zz", ""},
	} {
		f.Add(seed[0], seed[1], seed[2])
	}
	spec, _ := loadSpec(f)
	errorSchema := spec.Components.Schemas["Error"].Value
	f.Fuzz(func(t *testing.T, method, path, body string) {
		request, err := http.NewRequest(method, "http://ditto"+path, strings.NewReader(body))
		if err != nil {
			return
		}
		request.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		NewHandler(newFake(), func(grace time.Duration) {
			if grace < 0 || grace > maxGrace {
				t.Errorf("grace %s", grace)
			}
		}).ServeHTTP(w, request)
		switch w.Code {
		case 200, 202, 204:
		case 400, 404, 405:
			value, err := jsonValue(w.Body.Bytes())
			if err == nil {
				err = errorSchema.VisitJSON(value)
			}
			if err != nil {
				t.Errorf("%s %s: %s: %v", method, path, w.Body, err)
			}
		default:
			t.Errorf("%s %s %q: status %d: %s", method, path, body, w.Code, w.Body)
		}
	})
}

func jsonValue(data []byte) (value any, err error) {
	return value, json.Unmarshal(data, &value)
}
