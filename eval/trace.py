"""Record a routing trace from a running sglmoe server.

    python -m eval.trace --url http://127.0.0.1:30000 --output math.npz [--prompts FILE.jsonl]

Starts a recording (the server must be idle: a recording begins with an empty memory), sends the
prompts, writes the trace. `--prompts`: lines of {"text": ...}, with "sampling_params" if wanted;
without it, whatever others send in `--seconds` is recorded. The same by hand: SGLang's endpoints
/start_expert_distribution_record and /dump_expert_distribution_record, which write into the
folder that SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR names on the server's machine (default /tmp),
and /server_info, which says where.
"""

import argparse
import json
import re
import shutil
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm


def record(
    url: str,
    requests: list[dict[str, Any]],
    output: Path,
    *,
    concurrency: int,
    seconds: float = 0.0,
) -> str:
    """Send the requests, `concurrency` at a time, wait for `seconds`, and keep what was recorded.

    Raises RuntimeError with the server's reason where it can't record.
    """
    ask_recorder(url, "start")
    with ThreadPoolExecutor(concurrency) as pool:
        answers = pool.map(lambda request: post(f"{url}/generate", request), requests)
        list(tqdm(answers, total=len(requests), unit="request", disable=not requests))
    time.sleep(seconds)
    message = ask_recorder(url, "dump")
    found = re.search(r"(\S+\.npz)", message)
    assert found is not None, message
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(found[1], output)
    return message.replace(found[1], str(output))


def ask_recorder(url: str, action: str) -> str:
    """What the server said about it."""
    post(f"{url}/{action}_expert_distribution_record", {})
    with urllib.request.urlopen(f"{url}/server_info", timeout=60) as response:
        state = json.loads(response.read())["internal_states"][0].get("sglmoe")
    if state is None:
        raise RuntimeError(f"{url} is not an sglmoe server")
    if not state["recording"]["success"]:
        raise RuntimeError(state["recording"]["message"])
    return str(state["recording"]["message"])


def post(url: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return bytes(response.read())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.0)
    options = parser.parse_args()
    lines = options.prompts.read_text().splitlines() if options.prompts else []
    requests = [json.loads(line) for line in lines]
    print(
        record(
            options.url,
            requests,
            options.output,
            concurrency=options.concurrency,
            seconds=options.seconds,
        )
    )


if __name__ == "__main__":
    main()
