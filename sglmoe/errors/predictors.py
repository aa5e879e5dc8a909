"""Trained predictors and routing traces that are missing, broken, or of another model."""

from collections.abc import Sequence
from pathlib import Path

from sglmoe.errors.user_error import UserError

TRAIN = "python -m sglmoe.prediction.train"
COPY_OR_TRAIN = "copy it again, or train again"


def not_for_this_model(*, given: str, known: Sequence[str]) -> UserError:
    return UserError(
        f"--expert-predictor: there is no {given!r} for this model; there are {', '.join(known)}, and trained ones by the "
        "path of their .json"
    )


def unreadable_routers(*, path: Path) -> UserError:
    return UserError(
        f"{path}: this model's routers can't be read, which it needs; choose another --expert-predictor"
    )


def of_another_model(
    *, path: Path, its_shape: str, its_model: str, served: str, predictor: str
) -> UserError:
    return UserError(
        f"{path} predicts for {its_shape} ({its_model}), but the model "
        f"served has {served}: serve {its_model}, or train on traces of this model "
        f"({TRAIN} --predictor {predictor} --trace ...)"
    )


def other_tensors(*, path: Path, size: int) -> UserError:
    return UserError(
        f"{path} ({size} bytes) is not the file that the description beside it was "
        "written for: cut short, or of another training; copy both files again, or train again"
    )


def of_version(*, path: Path, version: int, expected: int) -> UserError:
    return UserError(f"{path} has version {version}, not {expected}: train again ({TRAIN})")


def no_description(*, path: Path, why: str) -> UserError:
    return UserError(f"{path} does not describe a predictor ({why}): {COPY_OR_TRAIN}")


def unreadable(*, path: Path, why: str) -> UserError:
    return UserError(f"{path}: {why}; it is written by {TRAIN}")


def missing_sizes(*, names: Sequence[str]) -> UserError:
    return UserError(f"a hybrid predictor has these sizes too: {', '.join(names)}: {COPY_OR_TRAIN}")


def wrong_tensors(*, found: str, expected: str) -> UserError:
    return UserError(
        f"not a hybrid predictor's tensors: {found}, where {expected} was due: {COPY_OR_TRAIN}"
    )


# ---------------------------------------------------------------------------------------------------- traces, training


def no_trace(*, path: Path) -> UserError:
    return UserError(f"{path} is not a routing trace; record one (python -m eval.trace)")


def trace_of_version(*, path: Path, version: int, expected: int) -> UserError:
    return UserError(f"{path} has version {version}, not {expected}: record it again")


def bad_trace(*, path: Path, why: str) -> UserError:
    return UserError(f"--trace {path}: {why}")


def traces_of_two_models(*, first: Path, its_model: str, path: Path, model: str) -> UserError:
    return UserError(
        f"{first} is a trace of {its_model}, {path} of {model}: a predictor learns from traces of one model (--trace)"
    )


def trace_of_another_vocabulary(
    *, path: Path, token_id: int, last_id: int, model: str
) -> UserError:
    return UserError(
        f"{path} has token id {token_id}, and the vocabulary of --model-path ends at "
        f"{last_id}: name the model that was traced, {model}"
    )


def single_request(*, name: str) -> UserError:
    return UserError(
        f"{name} is of one request: none is left to test with; record more (python -m eval.trace)"
    )


def no_model_folder(*, model_path: Path) -> UserError:
    return UserError(f"--model-path {model_path} has no config.json: name a model's folder")


def no_vocabulary(*, path: Path) -> UserError:
    return UserError(
        f"{path} has no vocab_size: name the folder of a whole model with --model-path"
    )


def gates_of_another_shape(*, model_path: str, shape: str, model: str) -> UserError:
    return UserError(
        f"{model_path} has gates of shape {shape}, the trace is of {model}: name that with --model-path"
    )


def gates_of_another_model(
    *, request: int, distance: float, max_distance: float, model: str
) -> UserError:
    return UserError(
        f"the probabilities of request {request} are {distance:.2f} away from the trace's "
        f"(total variation, at most {max_distance:.2f}): is --model-path the model that {model} was?"
    )


def grouped_experts(*, model_path: str) -> UserError:
    return UserError(
        f"{model_path} chooses among groups of experts, which is not read here; choose --predictor routing_path"
    )


def nothing_to_learn(*, num_tokens: int, num_layers: int) -> UserError:
    return UserError(
        f"nothing to learn from {num_tokens} tokens in {num_layers} MoE layers: name other traces with --trace"
    )


def no_embeddings(*, model_path: Path) -> UserError:
    return UserError(
        f"--model-path {model_path} has no input embeddings in a .safetensors file; convert the checkpoint"
    )
