package live

import (
	"context"
	"errors"
)

// Send moves a VM to where dial leads. When it returns, the VM has left, or runs
// (or stands) as it did before, or the error is an [InDoubtError] or
// [StuckError]. Until the commit point the context cancels it.
func Send(ctx context.Context, vm SourceVM, dial Dialer, o Options) (Report, error) {
	return Report{}, errors.ErrUnsupported
}

// AskOutcome asks a destination what became of a migration.
func AskOutcome(ctx context.Context, dial Dialer, token Token) (Outcome, error) {
	return OutcomeUnknown, errors.ErrUnsupported
}
