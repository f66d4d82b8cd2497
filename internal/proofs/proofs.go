// Package proofs keeps the last measured figure of each claim in a Markdown
// table (docs/proofs.md):
//
//	| claim id | what is claimed | proven by | last figure |
//	|----------|-----------------|-----------|-------------|
//	| boot-200 | 200 boots leak nothing | `make prove` | 0 fds, 0 goroutines (2026-11-22, AMD EPYC) |
//
// A row belongs to a claim if its first cell is the claim's id. The figure is
// the last cell. Everything else in the file is the author's and is left alone.
package proofs

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// ErrNoRow says that no row of the table begins with a claim's id.
var ErrNoRow = errors.New("no row for this claim")

// Update returns text with the figure of the claim id replaced. Every row with
// that id is changed.
func Update(text, id, figure string) (string, error) {
	if strings.ContainsAny(figure, "|\n\r") {
		return "", fmt.Errorf("figure %q of claim %s would break the table", figure, id)
	}
	lines := strings.Split(text, "\n")
	found := false
	for i, line := range lines {
		cells, ok := splitRow(line)
		if !ok || len(cells) < 3 || strings.TrimSpace(strings.Trim(strings.TrimSpace(cells[0]), "`")) != id {
			continue
		}
		cells[len(cells)-1] = " " + figure + " "
		lines[i] = "|" + strings.Join(cells, "|") + "|"
		found = true
	}
	if !found {
		return "", fmt.Errorf("claim %s: %w", id, ErrNoRow)
	}
	return strings.Join(lines, "\n"), nil
}

// splitRow returns the cells of a table row, with the spaces around them. A
// backslash protects a bar inside a cell.
func splitRow(line string) (cells []string, ok bool) {
	trimmed := strings.TrimSpace(line)
	if len(trimmed) < 2 || trimmed[0] != '|' || trimmed[len(trimmed)-1] != '|' {
		return nil, false
	}
	trimmed = trimmed[1 : len(trimmed)-1]
	start := 0
	for i := 0; i < len(trimmed); i++ {
		switch trimmed[i] {
		case '\\':
			i++
		case '|':
			cells = append(cells, trimmed[start:i])
			start = i + 1
		}
	}
	return append(cells, trimmed[start:]), true
}

// UpdateFile applies [Update] to a file.
func UpdateFile(path, id, figure string) error {
	old, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("proofs: %w", err)
	}
	text, err := Update(string(old), id, figure)
	if err != nil {
		return fmt.Errorf("proofs: %s: %w", path, err)
	}
	if text == string(old) {
		return nil
	}
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		return fmt.Errorf("proofs: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("proofs: %w", err)
	}
	return nil
}
