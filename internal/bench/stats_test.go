package bench

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSummarize(t *testing.T) {
	for _, test := range []struct {
		values []float64
		want   Summary
	}{
		{nil, Summary{}},
		{[]float64{3}, Summary{3, 3, 3, 1}},
		{[]float64{9, 1, 5}, Summary{5, 1, 9, 3}},
		{[]float64{4, 1, 2, 100}, Summary{3, 1, 100, 4}},
	} {
		if got := Summarize(test.values); got != test.want {
			t.Errorf("Summarize(%v) = %+v, want %+v", test.values, got, test.want)
		}
	}
	values := []float64{3, 1, 2}
	Summarize(values)
	if diff := cmp.Diff([]float64{3, 1, 2}, values); diff != "" {
		t.Errorf("the argument was changed:\n%s", diff)
	}
}

func TestRatios(t *testing.T) {
	got := Ratios([]float64{2, 9, 1, 5}, []float64{1, 3, 0})
	if diff := cmp.Diff([]float64{2, 3}, got); diff != "" {
		t.Error(diff)
	}
}

// The median of ratios is not the ratio of medians: a host that is slow for
// one round must not decide.
func TestRatiosPairByPair(t *testing.T) {
	a, b := []float64{10, 40, 11}, []float64{20, 80, 22}
	if got := Summarize(Ratios(a, b)); got != (Summary{0.5, 0.5, 0.5, 3}) {
		t.Errorf("got %+v, want 0.5 throughout", got)
	}
}

func TestFormatNumber(t *testing.T) {
	for _, test := range []struct {
		v    float64
		want string
	}{
		{0, "0"}, {1, "1.00"}, {12.345, "12.3"}, {123.4, "123"}, {98765, "98765"},
		{0.98765, "0.988"}, {0.0123456, "0.0123"}, {-4.5678, "-4.57"},
	} {
		if got := formatNumber(test.v); got != test.want {
			t.Errorf("formatNumber(%v) = %q, want %q", test.v, got, test.want)
		}
	}
}
