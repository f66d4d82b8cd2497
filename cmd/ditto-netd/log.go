package main

import (
	"context"
	"io"
	"log/slog"

	"github.com/sirupsen/logrus"
)

// captureLibraryLog sends what the network stack logs by way of logrus to log,
// as Debug: nearly all of it is about single packets of the guest, who could
// fill the log with it.
func captureLibraryLog(log *slog.Logger) {
	logrus.SetOutput(io.Discard)
	if log.Enabled(context.Background(), slog.LevelDebug) {
		logrus.SetLevel(logrus.DebugLevel)
		logrus.AddHook(logHook{log})
		return
	}
	logrus.SetLevel(logrus.PanicLevel)
}

// logHook implements logrus.Hook over slog.
type logHook struct{ log *slog.Logger }

func (logHook) Levels() []logrus.Level { return logrus.AllLevels }

func (h logHook) Fire(entry *logrus.Entry) error {
	h.log.Debug(entry.Message, "level", entry.Level.String())
	return nil
}
