package qcow2

// length is the sum of the lengths of bufs.
func length(bufs [][]byte) (n int64) {
	for _, b := range bufs {
		n += int64(len(b))
	}
	return n
}

// take returns the first n bytes of bufs, which it does not change.
func take(bufs [][]byte, n int64) [][]byte {
	if len(bufs) == 1 {
		return [][]byte{bufs[0][:n]}
	}
	var out [][]byte
	for _, b := range bufs {
		if n == 0 {
			break
		}
		b = b[:min(int64(len(b)), n)]
		out = append(out, b)
		n -= int64(len(b))
	}
	return out
}

// drop returns bufs without the first n bytes, and does not change them.
func drop(bufs [][]byte, n int64) [][]byte {
	for len(bufs) > 0 && n >= int64(len(bufs[0])) {
		n -= int64(len(bufs[0]))
		bufs = bufs[1:]
	}
	if n == 0 {
		return bufs
	}
	return append([][]byte{bufs[0][n:]}, bufs[1:]...)
}

func zero(bufs [][]byte) {
	for _, b := range bufs {
		clear(b)
	}
}
