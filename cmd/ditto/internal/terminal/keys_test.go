package terminal

import "testing"

func TestKeys(t *testing.T) {
	type step struct {
		guest   string
		command Command
	}
	for _, test := range []struct {
		name  string
		input []string
		want  []step
	}{
		{"text", []string{"ls\r"}, []step{{"ls\r", None}}},
		{"detach", []string{"ab\x01dcd"}, []step{{"ab", Detach}, {"cd", None}}},
		{"apart", []string{"\x01", "x"}, []step{{"", None}, {"", Quit}}},
		{"twice", []string{"\x01x\x01X"}, []step{{"", Quit}, {"", Quit}}},
		{"literal", []string{"\x01\x01\x01a"}, []step{{"\x01\x01", None}}},
		{"unknown", []string{"\x01k"}, []step{{"\x01k", None}}},
		{"help", []string{"\x01h\x01?"}, []step{{"", Help}, {"", Help}}},
	} {
		var keys Keys
		var got []step
		for _, input := range test.input {
			for rest := []byte(input); len(rest) > 0; {
				var guest []byte
				var c Command
				guest, c, rest = keys.Next(rest)
				got = append(got, step{string(guest), c})
			}
		}
		if len(got) != len(test.want) {
			t.Errorf("%s: %v, want %v", test.name, got, test.want)
			continue
		}
		for i := range got {
			if got[i] != test.want[i] {
				t.Errorf("%s: %v, want %v", test.name, got, test.want)
			}
		}
	}
}
