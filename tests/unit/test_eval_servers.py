"""No server outlives the benchmark that started it, however that ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from eval.servers import kill_when_we_are_gone


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "60"], start_new_session=True)


def test_a_group_is_killed_when_its_benchmark_is_even_where_it_was_stopped(tmp_path: Path) -> None:
    server = sleeper()
    server.send_signal(signal.SIGSTOP)
    code = (
        "import time; from eval.servers import kill_when_we_are_gone as watch; "
        f"watch({server.pid}); print('watching', flush=True); time.sleep(60)"
    )
    benchmark = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert benchmark.stdout is not None
    assert benchmark.stdout.readline() == b"watching\n"
    benchmark.kill()
    benchmark.communicate()
    assert server.wait(timeout=10) == -signal.SIGKILL


def test_a_group_lives_on_while_its_benchmark_does() -> None:
    server = sleeper()
    watchdog = kill_when_we_are_gone(server.pid)
    time.sleep(0.2)
    assert server.poll() is None
    # What a benchmark does that has stopped its server itself: nothing is left to kill.
    watchdog.kill()
    watchdog.communicate()
    time.sleep(0.2)
    assert server.poll() is None
    server.kill()
    server.wait()
