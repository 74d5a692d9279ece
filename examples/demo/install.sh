#!/bin/sh
# Install the system packages that are missing, or say which and how. `install.sh tests`: also what
# only the tests use.
set -eu

missing=""
need() { # COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
PATH="$PATH:/usr/sbin:/sbin"
PYTHON="${PYTHON:-python3}"
need qemu-nbd qemu-utils
need nbdcopy libnbd-bin
need qemu-storage-daemon qemu-system-common
need mke2fs e2fsprogs
need systemd-analyze systemd
need "$PYTHON" python3
if command -v "$PYTHON" >/dev/null 2>&1; then
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "cannot go on: $PYTHON is $("$PYTHON" --version 2>&1), and 3.11 or newer is needed;" \
            "name another with: make PYTHON=python3.12 …" >&2
        exit 1
    }
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
else
    missing="$missing python3-venv"
fi
if [ "${1:-}" = tests ]; then
    need mariadbd mariadb-server-core
    need mariadb-install-db mariadb-server-core
    need mariadb mariadb-client-core # mariadb-install-db asks it for its options
    need ssh openssh-client # with ssh-keygen and ssh-keyscan
    need sshd openssh-server
    need grub-fstest grub-common
    need strace strace
    # Debian's PostgreSQL is beside the PATH; the tests find it there.
    command -v initdb >/dev/null 2>&1 || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 ||
        missing="$missing postgresql"
fi
[ -n "$missing" ] || exit 0

install="apt-get update && apt-get install -y --no-install-recommends$missing"
case "$missing" in *postgresql*)
    # The tests run servers of their own: the package is not to make and start one as well.
    install="apt-get update && apt-get install -y --no-install-recommends postgresql-common && \
sed -ri 's/^#?create_main_cluster .*/create_main_cluster = false/' \
/etc/postgresql-common/createcluster.conf && apt-get install -y --no-install-recommends$missing" ;;
esac
case "$missing" in *openssh-server*)
    # Nor is this machine to be open to the network afterwards: the tests start an sshd themselves.
    # A policy of somebody else stays.
    [ -e /usr/sbin/policy-rc.d ] || install="{ echo \"#!/bin/sh\"; echo exit 101; } \
>/usr/sbin/policy-rc.d && chmod 755 /usr/sbin/policy-rc.d; { $install; }; code=\$?; \
rm -f /usr/sbin/policy-rc.d; exit \$code"
    install="( $install ) && { systemctl disable ssh.service ssh.socket 2>/dev/null || true; }" ;;
esac
if ! command -v apt-get >/dev/null 2>&1; then
    echo "cannot install:$missing is missing, and there is no apt-get here; install what has" \
        "qemu-nbd, qemu-storage-daemon, nbdcopy, mke2fs, systemd-analyze and Python's venv" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "cannot install:$missing is missing, and this is not root. Run:" >&2
    echo "  sudo sh -c '$install'" >&2
    exit 1
fi
echo "installing$missing …"
export DEBIAN_FRONTEND=noninteractive
sh -c "$install" >/tmp/reconciler-install.$$ 2>&1 || {
    tail -n 20 /tmp/reconciler-install.$$ >&2
    echo "cannot install$missing: see above; the command was: $install" >&2
    exit 1
}
rm -f /tmp/reconciler-install.$$
