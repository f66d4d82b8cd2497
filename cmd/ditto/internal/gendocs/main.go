// Gendocs writes the pages of docs/cli from the command tree: Markdown, and
// manual pages in man/. It is a program of its own so that ditto need not carry
// a Markdown library.
//
// Usage: gendocs FOLDER
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra/doc"

	"ditto.vm/cmd/ditto/internal/cli"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: gendocs FOLDER")
		os.Exit(2)
	}
	if err := generate(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "gendocs:", err)
		os.Exit(1)
	}
}

// generate replaces all pages in folder.
func generate(folder string) error {
	man := filepath.Join(folder, "man")
	if err := os.MkdirAll(man, 0o755); err != nil {
		return err
	}
	for _, pattern := range []string{filepath.Join(folder, "ditto*.md"), filepath.Join(man, "ditto*.1")} {
		old, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		for _, path := range old {
			if err := os.Remove(path); err != nil {
				return err
			}
		}
	}
	root := (&cli.Env{}).NewRoot()
	root.DisableAutoGenTag = true
	if err := doc.GenMarkdownTree(root, folder); err != nil {
		return err
	}
	// The same input gives the same pages, whenever they are made.
	date := time.Date(2026, time.January, 1, 0, 0, 0, 0, time.UTC)
	return doc.GenManTree(root, &doc.GenManHeader{Title: "DITTO", Section: "1", Source: "ditto", Manual: "ditto manual", Date: &date}, man)
}
