"""Memory limits of control groups, read from made-up /proc and /sys trees."""

from pathlib import Path

import pytest

from sglmoe.machine import cgroup_limits, has_accelerator, host_memory_bytes


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_version_2_limits_hold_from_the_group_up_to_the_root(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/pod/container\n",
        "sys/fs/cgroup/pod/container/memory.max": "max\n",
        "sys/fs/cgroup/pod/memory.max": "2000\n",
        "sys/fs/cgroup/memory.max": "3000\n",
    }
    write(tmp_path, files)
    assert list(cgroup_limits(tmp_path)) == [2000, 3000]
    assert host_memory_bytes(tmp_path) == 2000


def test_version_1_limits_are_those_of_the_memory_controller(tmp_path: Path) -> None:
    """In a container the group's own path is often not mounted; the mount's root is the container's."""
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/elsewhere\n4:memory:/not/mounted\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "4096\n",
        "sys/fs/cgroup/cpu/memory.limit_in_bytes": "1\n",
    }
    write(tmp_path, files)
    assert list(cgroup_limits(tmp_path)) == [4096]


def test_without_control_groups_the_system_is_the_limit(tmp_path: Path) -> None:
    assert list(cgroup_limits(tmp_path)) == []
    assert host_memory_bytes(tmp_path) > 1 << 20


@pytest.mark.parametrize(("file", "expected"), [("nvidiactl", True), ("tty", False)])
def test_accelerators_are_known_by_their_device_files(
    tmp_path: Path, file: str, expected: bool
) -> None:
    write(tmp_path, {file: ""})
    assert has_accelerator(tmp_path) is expected
