"""What is refused, on the flags of a made-up sglang: honoured, refused and new ones."""

import pytest

from sglmoe.flags import refused_environment, refused_flags, unclassified

DEFAULTS = {
    "port": 30000,
    "grammar_backend": None,
    "tp_size": 1,
    "quantization": None,
    "enable_lora": None,
    "speculative_algorithm": None,
    "brand_new": "off",
    "_private": None,
}
NAMESPACES = dict.fromkeys(DEFAULTS, "serving") | {
    "tp_size": "parallel",
    "enable_lora": "lora",
    "speculative_algorithm": "spec",
}


def refusals(**given: object) -> list[str]:
    return refused_flags(DEFAULTS | given, DEFAULTS, NAMESPACES)


def test_defaults_are_served() -> None:
    assert refusals() == []


@pytest.mark.parametrize(
    "given",
    [
        {"port": 1},
        {"grammar_backend": "xgrammar"},
        {"enable_lora": False},  # off, said aloud
        {"_private": True},
    ],
)
def test_honoured_flags_pass(given: dict[str, object]) -> None:
    assert refusals(**given) == []


@pytest.mark.parametrize(
    ("given", "start", "what_to_do"),
    [
        ({"tp_size": 2}, "--tp-size=2: ", "one server for each device"),
        ({"quantization": "fp8"}, "--quantization=fp8: ", "GPTQ or AWQ; leave it out"),
        ({"enable_lora": True}, "--enable-lora=True: ", "merge them"),
        ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm=EAGLE: ", "leave it out"),
        ({"grammar_backend": "outlines"}, "--grammar-backend=outlines: ", "use xgrammar"),
    ],
)
def test_refusals_name_the_flag_and_what_to_do(
    given: dict[str, object], start: str, what_to_do: str
) -> None:
    (refusal,) = refusals(**given)
    assert refusal.startswith(start)
    assert what_to_do in refusal


def test_every_refused_flag_is_named_at_once() -> None:
    assert len(refusals(tp_size=2, enable_lora=True, port=1)) == 2


def test_a_flag_that_nobody_has_thought_about_is_refused_and_reported() -> None:
    assert refusals(brand_new="on") == [
        "--brand-new=on: sglmoe does not honour it yet; leave it out"
    ]
    assert unclassified(NAMESPACES) == ["brand_new"]


def test_environment_variables_that_replace_the_front_end_are_refused() -> None:
    assert refused_environment({"SGLANG_RUST_SERVER": "0", "HOME": "/"}) == []
    (refusal,) = refused_environment({"SGLANG_RUST_SERVER": "1"})
    assert "unset it" in refusal
