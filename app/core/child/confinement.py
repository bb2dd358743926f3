"""Confines a process that works on untrusted files: no keys, network, privileges or core files.

No network: the process moves into a network namespace of its own, in which only loopback exists. Where the
kernel forbids that, it goes on with a network, and says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

PR_SET_NO_NEW_PRIVS = 38
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
OFFLINE = "HF_HUB_OFFLINE"
QUIET = {OFFLINE: "1", "TQDM_DISABLE": "1"}  # no network is asked for, no bar is drawn
MAX_FILE_BYTES = 256 * 1024**3
NETWORK = "NIBBLE_CHILD_NETWORK"  # tells the child's module: on or off
PASSED_ON = frozenset({"PATH", "HOME", "LANG", "LD_LIBRARY_PATH"})
PASSED_PREFIXES = ("CUDA_", "NVIDIA_", "OMP_", "GOMP_", "KMP_", "MKL_", "PYTHON")


def child_environment(environment: Mapping[str, str], work_folder: Path) -> dict[str, str]:
    """The child's environment variables, without keys and addresses.

    Its threads sleep while they wait for each other, unless the environment says otherwise.
    """
    passed = {
        name: value
        for name, value in environment.items()
        if name in PASSED_ON or name.startswith(PASSED_PREFIXES)
    }
    return {"OMP_WAIT_POLICY": "passive", **passed, **QUIET, "TMPDIR": str(work_folder)}


def confine() -> bool:
    """Drop network and privileges; returns whether the network is gone. Call it before any thread starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    most = MAX_FILE_BYTES if hard == resource.RLIM_INFINITY else min(MAX_FILE_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    is_off = leave_network(libc)
    os.environ[NETWORK] = "off" if is_off else "on"
    return is_off


def leave_network(libc: ctypes.CDLL) -> bool:
    """Move into an empty network: as root directly, else by way of a user namespace with the same ids."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNET) != 0:
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
            return False
        with contextlib.suppress(OSError):  # without the map the ids only look different
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    return True
