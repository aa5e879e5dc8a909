"""What a soak concludes from its samples."""

import pytest

from eval.soak import Sample, Usage, growth, role_of, verdicts


def sample(seconds: float, *, mib: float, files: int = 40) -> Sample:
    return Sample(
        seconds=seconds,
        processes={"worker": Usage(own_mib=7.0, files=files, threads=9, anonymous_mib=mib)},
        frames=(8, 4, 0),
        num_running=3,
        num_queued=0,
        num_done=100,
    )


def found(**changes: object) -> dict[str, object]:
    quiet = {"unanswered": 0, "left_at_the_end": 0, "problems": [], "growth_per_hour": {}}
    return quiet | changes


def test_growth_is_what_comes_after_the_warm_up() -> None:
    """A gigabyte in the first third, then 1 MiB and a file every 360 s: 10 of each an hour."""
    warm_up = [sample(100.0 * i, mib=1000.0 * i) for i in range(3)]
    settled = [sample(360.0 * i, mib=2000.0 + i, files=40 + i) for i in range(1, 7)]
    grown = {"own_mib": 0.0, "files": 10.0, "threads": 0.0, "anonymous_mib": 10.0}
    assert growth(warm_up + settled) == {"worker": grown}


def test_a_process_that_was_not_there_all_the_time_is_not_fitted() -> None:
    samples = [sample(10.0 * i, mib=5.0) for i in range(9)]
    late = samples[-1]._replace(
        processes={"worker": Usage(5.0, 40, 9, 5.0), "sh": Usage(1.0, 3, 1, 1.0)}
    )
    assert set(growth([*samples[:-1], late])) == {"worker"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"unanswered": 2}, ["2 unanswered"]),
        ({"left_at_the_end": 1}, ["1 left_at_the_end"]),
        ({"problems": ["chat: Wrong()"]}, ["chat: Wrong()"]),
        ({"growth_per_hour": {"worker": {"anonymous_mib": 31.0, "files": 7.0}}}, []),
        (
            {"growth_per_hour": {"worker": {"anonymous_mib": 33.0, "files": 7.0}}},
            ["worker grows by 33.0 MiB an hour"],
        ),
        (
            {"growth_per_hour": {"worker": {"anonymous_mib": 0.0, "files": 9.0}}},
            ["worker opens 9.0 files an hour more than it closes"],
        ),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, object], said: list[str]) -> None:
    assert verdicts(found(**changes)) == said


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["sglmoe::worker", "", ""], "worker"),
        (["sglang::scheduler"], "scheduler"),
        (["python", "-c", "from multiprocessing.forkserver import main; main(5)"], "forkserver"),
        (["python", "-c", "from multiprocessing.resource_tracker import main"], "resource_tracker"),
        (["sh", "-c", "read"], "sh -c read"),
    ],
)
def test_a_process_goes_by_its_role(command: list[str], role: str) -> None:
    assert role_of(command, is_launcher=False) == role
    assert role_of(command, is_launcher=True) == "launcher"
