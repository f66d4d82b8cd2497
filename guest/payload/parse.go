package payload

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Parse returns the program that spec names, with its options:
//
//	hello[:MESSAGE]
//	halt[:STATUS]
//	spin
//	memwriter[:size=64M,order=random,words=8,fill,rate=1000,limit=N,seed=N,check=N,stall=1ms]
func Parse(spec string) (*Program, error) {
	name, options, _ := strings.Cut(spec, ":")
	switch name {
	case "hello":
		if options == "" {
			options = "hello"
		}
		return Hello(options + "\n")
	case "halt":
		status, err := strconv.ParseUint("0"+options, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("payload halt: bad status %q", options)
		}
		return Halt(uint32(status)), nil
	case "spin":
		return Spin(), nil
	case "memwriter":
		config, err := parseMemWriter(options)
		if err != nil {
			return nil, fmt.Errorf("payload memwriter: %w", err)
		}
		return MemWriter(config)
	}
	return nil, fmt.Errorf("no payload is called %q: use hello, halt, spin or memwriter", name)
}

// parseMemWriter reads the options of a memory writer.
func parseMemWriter(options string) (MemWriterConfig, error) {
	var c MemWriterConfig
	if options == "" {
		return c, nil
	}
	for option := range strings.SplitSeq(options, ",") {
		key, value, _ := strings.Cut(option, "=")
		var err error
		switch key {
		case "size":
			c.WorkingSet, err = parseSize(value)
		case "order":
			c.Order, err = parseOrder(value)
		case "words":
			c.Words, err = strconv.Atoi(value)
		case "fill":
			if c.Fill = true; value != "" {
				err = strconv.ErrSyntax
			}
		case "rate":
			c.Rate, err = strconv.ParseUint(value, 10, 64)
		case "limit":
			c.Limit, err = strconv.ParseUint(value, 10, 64)
		case "seed":
			c.Seed, err = strconv.ParseUint(value, 0, 64)
		case "check":
			c.CheckEvery, err = strconv.ParseUint(value, 10, 64)
		case "stall":
			c.Stall, err = time.ParseDuration(value)
		default:
			return c, fmt.Errorf("unknown option %q: use size, order, words, fill, rate, limit, seed, check or stall", key)
		}
		if err != nil {
			return c, fmt.Errorf("bad value in %q", option)
		}
	}
	return c, nil
}

// parseOrder reads an order by its name.
func parseOrder(s string) (Order, error) {
	for i, name := range orderNames {
		if s == name {
			return Order(i), nil
		}
	}
	return 0, strconv.ErrSyntax
}

// parseSize reads bytes with an optional suffix K, M or G.
func parseSize(s string) (uint64, error) {
	shift := 0
	for i, suffix := range []string{"K", "M", "G"} {
		if digits, ok := strings.CutSuffix(s, suffix); ok {
			s, shift = digits, 10*(i+1)
		}
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n > 1<<50>>shift {
		return 0, strconv.ErrSyntax
	}
	return n << shift, nil
}
