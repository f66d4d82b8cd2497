package cli

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

func TestFindSocket(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1E6C 00000000:0000 0A 00000000:00000000 00:00000000 00000000     7        0 100 1 0 100 0 0 10 0
   1: 0100007F:C350 0100007F:1E6C 01 00000000:00000000 00:00000000 00000000  1000        0 101 1 0 20 4 30 10 -1
   2: 0100007F:C351 0100007F:1E6C 04 00000000:00000000 00:00000000 00000000     0        0 0 1 0 20 4 30 10 -1
   3: 0100007F:C352 0100007F:1E6C 01 00000000:00000000 00:00000000 00000000     0        0 0 1 0 20 4 30 10 -1
   4: 00000000000000000000000001000000:C353 00000000000000000000000001000000:1E6C 01 00000000:00000000 00:00000000 00000000  1001        0 102 1
   5: 0000000000000000FFFF00000100007F:C354 0000000000000000FFFF00000100007F:1E6C 01 00000000:00000000 00:00000000 00000000  1002        0 103 1
   6: nonsense:C355 0100007F 01 x x x 5 5 5
`
	for _, test := range []struct {
		local, remote string
		uid           int
		found         bool
	}{
		{"127.0.0.1:50000", "127.0.0.1:7788", 1000, true},
		{"127.0.0.1:50001", "127.0.0.1:7788", 0, false}, // closed by its user
		{"127.0.0.1:50002", "127.0.0.1:7788", 0, false}, // nobody's
		{"[::1]:50003", "[::1]:7788", 1001, true},
		{"127.0.0.1:50004", "127.0.0.1:7788", 1002, true},
		{"127.0.0.1:50000", "127.0.0.1:7789", 0, false},
		{"127.0.0.1:7788", "127.0.0.1:50000", 0, false},
	} {
		uid, found, err := findSocket(strings.NewReader(table), netip.MustParseAddrPort(test.local), netip.MustParseAddrPort(test.remote))
		if uid != test.uid || found != test.found || err != nil {
			t.Errorf("%s: %d, %v, %v", test.local, uid, found, err)
		}
	}
}

// TestCheckPeerUser: this user may connect, and another may not.
func TestCheckPeerUser(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Logf("%s: %v", address, err)
			continue
		}
		defer l.Close()
		ours, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer ours.Close()
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := checkPeerUser(c); err != nil {
			t.Errorf("%s: %v", address, err)
		}
		if os.Getuid() != 0 {
			continue // only root can be another
		}
		_, port, _ := net.SplitHostPort(l.Addr().String())
		host := strings.Trim(strings.TrimSuffix(address, ":0"), "[]")
		cmd := exec.Command("bash", "-c", "exec 3<>/dev/tcp/"+host+"/"+port+"; read -u 3")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		theirs, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if err := checkPeerUser(theirs); !errors.Is(err, errOtherUser) {
			t.Errorf("%s: a connection of nobody: %v", address, err)
		}
		_ = theirs.Close()
		_ = cmd.Wait() // it has lost its peer
	}
}
