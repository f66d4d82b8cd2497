#!/bin/sh
# The first process of a Debian guest under load (TestLinuxSnapshotUnderLoad).
# Its argument on the kernel's command line is ADDRESS=IP/PREFIX.
export PS1='# ' PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LC_ALL=C
mountpoint -q /proc || mount -t proc proc /proc
mountpoint -q /sys || mount -t sysfs sys /sys
mountpoint -q /dev || mount -t devtmpfs dev /dev
mount -o remount,rw /
mount -t tmpfs tmp /tmp
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
cd /tmp || exit 1
ip link set lo up
for d in /sys/class/net/e*; do
	ip addr add "$ADDRESS" dev "${d##*/}"
	ip link set "${d##*/}" up
done

# load NAME COMMAND... runs a command again and again until there is a file
# called stop, and counts. What the command finds wrong stands in a file wrong.
load() {
	name=$1 n=0
	shift
	until [ -e stop ]; do
		"$@" > "$name.out" 2>&1 || { echo "$name:"; tail -n 5 "$name.out"; } >> wrong
		n=$((n + 1))
		echo "$n" > "$name.new"
		mv "$name.new" "$name.rounds"
	done
	touch "$name.done"
}
touch wrong
echo 0 > fio.rounds
echo 0 > stress.rounds
load fio fio --name=w --filename=/var/tmp/f --size=1M --rw=randwrite --bs=4k --direct=1 --verify=crc32c --do_verify=1 --randrepeat=0 --minimal &
load stress nice stress-ng --vm 1 --vm-bytes 12M --vm-ops 20 --verify --quiet --temp-path /tmp &
iperf3 -s > iperf.out 2>&1 &

# It answers each line with one more than what it said last, and with a nonce
# that is nowhere but in its memory.
perl -MIO::Socket::INET -e '
	open R, "<", "/dev/urandom"; read R, $b, 16; $nonce = unpack "H*", $b;
	$l = IO::Socket::INET->new(LocalPort => 7000, Listen => 1, ReuseAddr => 1) or die $!;
	while ($s = $l->accept) { $s->autoflush(1); while (<$s>) { $n++; print $s "$nonce $n\n" } }
' > counter.out 2>&1 &
exec sh -i
