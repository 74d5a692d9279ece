"""What `install.txt` says, typed by root on a machine of its own: its /etc, network and processes.

Both ends are one machine here, and what is systemd's is left out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.site import ROOT
from tests.hub_sshd import SSHD

OURS = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
SCRIPT = """
set -e
DIAL="setpriv --reuid tunnel --regid tunnel --clear-groups ssh"
DIAL="$DIAL -F /etc/reconciler/tunnels/hub-a.ssh_config"
mount -t tmpfs none /run; mkdir -p /run/sshd; mount -t tmpfs none /var/log
mount -t tmpfs none {folder}/etc; mkdir {folder}/etc/upper {folder}/etc/work
mount -t overlay none -o lowerdir=/etc,upperdir={folder}/etc/upper,workdir={folder}/etc/work /etc
ip link set lo up
if getent passwd tunnel >/dev/null; then userdel tunnel 2>/dev/null; fi
rm -f /etc/ssh/ssh_host_*; ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
printf 'Include /etc/ssh/sshd_config.d/*.conf\\nUsePAM no\\n' >/etc/ssh/sshd_config
rm -rf /etc/ssh/sshd_config.d /etc/reconciler
cd {folder}/hub; $R render sshd --key ../key.pub --port 443 --output out; cd out
grep -v 'systemctl\\|reconciler doctor' install.txt >typed; sh -e typed
{sshd} -t; {sshd}; while ! ss -ltn | grep -q ':443 '; do sleep 0.02; done
cd {folder}/sna; install -D -m 0640 ../key /etc/reconciler/tunnel_key
$R tunnel trust hub-a --fingerprint \
$(ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub | cut -d' ' -f2)
$R render tunnel hub-a --output out; cd out
grep -v 'systemctl\\|curl\\|service' install.txt >typed; sh -e typed
(cd {folder}/www; exec {python} -m http.server 8081 --bind 127.0.0.2 >/dev/null 2>&1) &
$DIAL -N -T hub-a &
until (exec 3<>/dev/tcp/127.0.0.1/9081) 2>/dev/null; do sleep 0.02; done
cd {folder}/hub; echo '== as printed'; $R doctor --only tunnel || true
echo '== a shell'; $DIAL -o ClearAllForwardings=yes hub-a echo in-a-shell || true
usermod --password '!' tunnel; chmod 0666 /etc/ssh/authorized_keys.d/tunnel
echo '== spoilt'; $R doctor --only tunnel || true
chmod 0644 /etc/ssh/authorized_keys.d/tunnel
echo '== locked'; $DIAL -o ClearAllForwardings=yes hub-a true 2>&1 || true
"""


def test_what_is_printed_can_be_typed_and_then_there_is_a_tunnel(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not os.path.exists(SSHD):
        pytest.skip("it takes root and openssh-server")
    if subprocess.run([*OURS, "true"], capture_output=True, timeout=20).returncode:
        pytest.skip("no namespaces of one's own here")
    hub, sna = tmp_path / "hub", tmp_path / "sna"
    for folder in (hub, sna / "specs", tmp_path / "etc", tmp_path / "www" / "api" / "v1"):
        folder.mkdir(parents=True)
    (tmp_path / "www" / "api" / "v1" / "health").write_text("{}")
    (hub / "reconciler.yaml").write_text(
        'hub: hub-a\nstate: state\nsnas: {site-a: {url: "http://127.0.0.1:9081"}}\n'
    )
    (sna / "reconciler.yaml").write_text("hub: sna-a\nstate: state\n")
    (sna / "specs" / "t.yaml").write_text(
        "tunnels:\n"
        "  - name: hub-a\n"
        "    state: down\n"
        "    hub: {host: 127.0.0.1, port: 443}\n"
        "    identity: {file: /etc/reconciler/tunnel_key}\n"
        "    host_key: {file: hub-a.pub}\n"
        "    forward: {bind: 127.0.0.2}\n"
        "    reverse: {to: '127.0.0.2:8081'}\n"
    )
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True
    )
    script = SCRIPT.format(folder=tmp_path, sshd=SSHD, python=sys.executable)
    done = subprocess.run(
        [*OURS, "bash", "-c", script], capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, "R": f"{sys.executable} -m reconciler", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    _, printed, shell, spoilt, locked = re.split("== [a-z ]+\n", done.stdout)
    assert printed.endswith("\n5 ok.\n"), printed
    assert "listens on 22, 443" in printed
    assert "user tunnel, from 127.0.0.1:" in printed
    assert "in-a-shell" not in shell
    assert "tunnel is locked (! in /etc/shadow)" in spoilt
    assert "/etc/ssh/authorized_keys.d/tunnel can be written by others, mode 0666" in spoilt
    assert "Permission denied (publickey)" in locked, "sshd itself says what doctor says"
