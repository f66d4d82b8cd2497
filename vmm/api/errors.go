package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
)

// RequestError is a failure that the API reports. It is made by the server's
// handlers and comes out of [Remote]'s methods.
type RequestError struct {
	Status int // HTTP status
	Body   Error
}

// Error returns the message and the hint in one line.
func (e *RequestError) Error() string {
	if e.Body.Hint == "" {
		return e.Body.Message
	}
	return e.Body.Message + ": " + e.Body.Hint
}

// Is makes errors.Is(err, ErrWrongState) and the like hold on the client's side.
func (e *RequestError) Is(target error) bool {
	return target == ErrWrongState && e.Body.Code == WrongState ||
		target == ErrNotSupported && e.Body.Code == NotSupported
}

func badRequest(hint, format string, args ...any) *RequestError {
	return &RequestError{http.StatusBadRequest, Error{Code: BadRequest, Message: fmt.Sprintf(format, args...), Hint: hint}}
}

// mistakeError is an error of whoever asked.
type mistakeError struct{ error }

// Unwrap returns the error.
func (e mistakeError) Unwrap() error { return e.error }

// Mistake marks an error of a [Machine] as one of whoever asked.
func Mistake(err error) error { return mistakeError{err} }

// asRequestError classifies what a machine returned.
func asRequestError(err error) *RequestError {
	var e *RequestError
	var mistake mistakeError
	switch {
	case errors.As(err, &e):
		return e
	case errors.Is(err, ErrWrongState):
		return &RequestError{http.StatusConflict, Error{Code: WrongState, Message: oneLine(err), Hint: "ask /v1/vm for the state"}}
	case errors.Is(err, ErrNotSupported):
		return &RequestError{http.StatusNotImplemented, Error{Code: NotSupported, Message: oneLine(err), Hint: "start the machine with that device"}}
	case errors.As(err, &mistake):
		return badRequest("", "%s", oneLine(err))
	default:
		return &RequestError{http.StatusInternalServerError, Error{Code: Internal, Message: oneLine(err), Hint: "the machine's log may tell more"}}
	}
}

func oneLine(err error) string {
	return strings.Join(strings.Fields(err.Error()), " ")
}

// writeError sends e as the response.
func writeError(w http.ResponseWriter, e *RequestError) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(e.Status)
	_ = json.NewEncoder(w).Encode(e.Body)
}
