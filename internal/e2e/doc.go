// Package e2e tests ditto as its users have it: the built commands, on guests
// with Debian's kernels and userland. The tests run where Linux guests can, see
// internal/labtest; what they boot comes from internal/material.
package e2e
