#!/bin/busybox sh
# First process of the machine: the host's files, read-only, below files of its own; then the script that the kernel's
# command line names. What it says goes to the console; the machine ends with it.
b=/bin/busybox
$b mkdir -p /proc /sys /dev /host /own /machine
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
for word in $($b cat /proc/cmdline); do
    case $word in ambit.*) eval "${word#ambit.}" ;; esac
done
for module in virtio_pci 9pnet_virtio 9p overlay; do $b modprobe $module || $b echo "no module $module"; done
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro host /host &&
    $b mount -t tmpfs -o mode=755 own /own &&
    $b mkdir -p /own/upper /own/work &&
    $b mount -t overlay -o lowerdir=/host,upperdir=/own/upper,workdir=/own/work overlay /machine || $b poweroff -f
for directory in proc sys dev run; do $b mkdir -p /machine/$directory; done
$b mount --move /proc /machine/proc
$b mount --move /sys /machine/sys
$b mount --move /dev /machine/dev
$b mount -t tmpfs -o mode=755 run /machine/run
$b mkdir -p /machine/dev/shm /machine/usr/lib/modules /machine/run/ambit-machine
$b mount --bind "/host$modules" /machine/usr/lib/modules
$b mount -t cgroup2 cgroup2 /machine/sys/fs/cgroup
$b mount -t bpf bpf /machine/sys/fs/bpf
$b ip link set lo up
# The kernel's helper, which this machine may lack.
$b cp /bin/busybox /machine/run/ambit-machine/
$b printf '#!/bin/sh\nexec /run/ambit-machine/busybox modprobe "$@"\n' > /machine/run/ambit-machine/modprobe
$b chmod +x /machine/run/ambit-machine/modprobe
$b echo /run/ambit-machine/modprobe > /machine/proc/sys/kernel/modprobe
# No chroot: who is in one can make no user namespace, and the kernel's helper would not be.
exec $b switch_root /machine /run/ambit-machine/busybox sh -c '/bin/sh "$0"
    echo "ambit-machine: exit $?"
    /run/ambit-machine/busybox poweroff -f' "$script"
