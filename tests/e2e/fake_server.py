"""SGLang's real server over our scheduler and a fake worker. Takes SGLang's flags."""

import os
import sys

from sglmoe import start_up
from sglmoe.config import EngineConfig


def serve() -> None:
    start_up.start_importing()
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    start_up.keep_start_method()
    try:
        launch_server(
            prepare_server_args(sys.argv[1:]),
            run_scheduler_process_func=start_up.ChildEntry(
                "sglmoe.scheduler.process",
                "run_scheduler",
                config=EngineConfig(memory_budget_bytes=0, host_memory_bytes=0),
                run_worker=start_up.ChildEntry("fake_worker", "run_fake_worker"),
            ),
        )
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    start_up.leave_after(serve)
