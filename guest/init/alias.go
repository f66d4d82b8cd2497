package main

import "strings"

// normalize maps '-' to '_' outside brackets, as kmod does for module names
// and aliases, so that either spelling finds a module.
func normalize(s string) string {
	if !strings.Contains(s, "-") {
		return s
	}
	b := []byte(s)
	inBrackets := false
	for i, c := range b {
		switch {
		case c == '[':
			inBrackets = true
		case c == ']':
			inBrackets = false
		case c == '-' && !inBrackets:
			b[i] = '_'
		}
	}
	return string(b)
}

// matchAlias tells whether a name matches an alias pattern of modules.alias,
// which is a shell pattern: '*', '?' and bracketed sets. It runs in
// O(len(pattern) * len(name)): the last '*' alone is ever retried.
func matchAlias(pattern, name string) bool {
	star, retry := -1, 0
	p, n := 0, 0
	for n < len(name) {
		if p < len(pattern) && pattern[p] == '*' {
			star, retry = p, n
			p++
			continue
		}
		if p < len(pattern) {
			if w, ok := matchOne(pattern[p:], name[n]); ok {
				p, n = p+w, n+1
				continue
			}
		}
		if star < 0 {
			return false
		}
		retry++
		p, n = star+1, retry
	}
	return strings.Trim(pattern[p:], "*") == ""
}

// matchOne matches one character against the first element of a pattern and
// returns that element's width. A bracket that never closes stands for itself.
func matchOne(pattern string, c byte) (width int, ok bool) {
	switch pattern[0] {
	case '?':
		return 1, true
	case '[':
		if end := strings.IndexByte(pattern, ']'); end > 0 {
			return end + 1, inSet(pattern[1:end], c)
		}
	}
	return 1, pattern[0] == c
}

// inSet matches the inside of a bracketed set such as "0-9A-F", negated by a
// leading '!' or '^'.
func inSet(set string, c byte) bool {
	negate := set != "" && (set[0] == '!' || set[0] == '^')
	if negate {
		set = set[1:]
	}
	found := false
	for i := 0; i < len(set); i++ {
		if i+2 < len(set) && set[i+1] == '-' {
			found = found || set[i] <= c && c <= set[i+2]
			i += 2
			continue
		}
		found = found || set[i] == c
	}
	return found != negate
}
