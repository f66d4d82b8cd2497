package bench

import (
	"math"
	"strconv"
)

// formatValue writes a value with three significant digits and its unit.
func formatValue(v float64, unit string) string {
	if unit == "" {
		return formatNumber(v)
	}
	return formatNumber(v) + " " + unit
}

// formatNumber writes three significant digits, and no exponent.
func formatNumber(v float64) string {
	if v == 0 {
		return "0"
	}
	digits := max(0, 2-int(math.Floor(math.Log10(math.Abs(v)))))
	if digits == 0 {
		return strconv.FormatFloat(math.Round(v), 'f', 0, 64)
	}
	return strconv.FormatFloat(v, 'f', digits, 64)
}
