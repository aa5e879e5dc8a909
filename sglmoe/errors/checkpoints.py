"""Checkpoints that are not whole, packed experts that are not theirs, and disks that give or take nothing."""

from collections.abc import Sequence
from pathlib import Path

from sglmoe.errors.user_error import UserError
from sglmoe.units import show_bytes

PACK_AGAIN = "run python -m sglmoe.pack again"


def not_a_checkpoint(*, folder: Path) -> UserError:
    return UserError(f"{folder} is not a folder with a checkpoint")


def no_safetensors(*, folder: Path) -> UserError:
    return UserError(f"{folder} has no *.safetensors files; convert the checkpoint")


def no_weight_map(*, path: Path) -> UserError:
    return UserError(f"{path} has no weight_map; download it again")


def wrong_size(*, path: Path, size: int, expected: int) -> UserError:
    """In bytes, told exactly."""
    return UserError(f"{path} has {size} bytes and should have {expected}; download it again")


def missing_file(*, path: Path) -> UserError:
    return UserError(f"{path} is missing; download it")


def truncated_file(*, path: Path) -> UserError:
    return UserError(f"{path} is truncated or no safetensors file; download it again")


def unreadable_file(*, path: Path, why: str) -> UserError:
    return UserError(f"{path} can't be read: {why}")


def not_json(*, path: Path, why: str) -> UserError:
    return UserError(f"{path} is not JSON ({why}); download it again")


def no_json_object(*, path: Path) -> UserError:
    return UserError(f"{path} holds no JSON object; download it again")


def wrong_shape(*, layer: int, expert: int, part: str, shape: str, expected: str) -> UserError:
    return UserError(
        f"expert {expert} of MoE layer {layer}: {part} has shape {shape} in the checkpoint where the model's config asks "
        f"for {expected}; download it again, with its own config.json"
    )


def missing_tensor(*, layer: int, expert: int, part: str) -> UserError:
    return UserError(
        f"layer {layer} expert {expert} {part} is missing from the checkpoint; download it again"
    )


def repeated_tensor(*, layer: int, expert: int, part: str) -> UserError:
    return UserError(
        f"layer {layer} expert {expert} {part} is in the checkpoint twice; download it again"
    )


def unordered_groups(*, layer: int, expert: int, part: str) -> UserError:
    return UserError(
        f"expert {expert} of MoE layer {layer}: inputs of {part} are in groups out of order (g_idx), as desc_act makes them, "
        "and config.json says nothing of it; use a checkpoint made with desc_act=false, or a bf16, fp16 or fp32 one"
    )


def unreadable_expert(*, layer: int, expert: int, source: str, why: str) -> UserError:
    return UserError(
        f"expert {expert} of MoE layer {layer} can't be read from {source}: {why}. The file was "
        "changed while being served, or its disk fails: restore the file and restart the server",
        status=500,
    )


# ------------------------------------------------------------------------------------------ packed experts, being read


def packed_for_another(*, path: Path, difference: str) -> UserError:
    return UserError(f"{path}: {difference}; {PACK_AGAIN}")


def packed_cut_short(*, path: Path) -> UserError:
    return UserError(f"{path} is cut short or no file of packed experts; {PACK_AGAIN}")


def packed_of_version(*, path: Path, version: int, expected: int) -> UserError:
    return UserError(f"{path} has version {version}, not {expected}; delete it, and {PACK_AGAIN}")


def packed_in_part(*, path: Path) -> UserError:
    return UserError(f"{path} has lost a part of itself; delete it, and {PACK_AGAIN}")


def packed_index_damaged(*, path: Path, why: str = "its index is damaged") -> UserError:
    return UserError(f"{path}: {why}; delete it, and {PACK_AGAIN}")


def packed_damaged(*, path: str, why: str) -> UserError:
    """Only told in the log: the experts are read from the checkpoint."""
    return UserError(
        f"{path} is damaged ({why}): its experts are read from the checkpoint from now on; delete it, and {PACK_AGAIN}"
    )


def packed_refused(*, wanted: str, why: str) -> UserError:
    """`why`: one of these messages."""
    return UserError(f"--packed-experts={wanted}: {why}")


def none_packed(*, folder: Path, model_path: str) -> UserError:
    return UserError(
        f"there are none in {folder}; make them with python -m sglmoe.pack --model-path {model_path}, "
        "or leave the flag out"
    )


def not_read_in_place() -> UserError:
    return UserError(
        "the model's experts are not read from the checkpoint as they lie there: it is served with another --dtype, its "
        "experts have to be rounded up on a CPU, or it has none"
    )


# ----------------------------------------------------------------------------------------------- python -m sglmoe.pack


def only_bf16_is_packed(*, folder: Path, dtypes: Sequence[str]) -> UserError:
    return UserError(
        f"{folder} has experts in {', '.join(dtypes)}; only BF16 is packed: serve it as it is"
    )


def no_experts_to_pack(*, folder: Path) -> UserError:
    return UserError(
        f"{folder} has no experts (tensors such as layers.0.mlp.experts.0.up_proj.weight): serve it as it is"
    )


def no_room_to_pack(*, folder: Path, needed_bytes: int, free_bytes: int) -> UserError:
    return UserError(
        f"{folder}: about {show_bytes(needed_bytes)} are to be written and {show_bytes(free_bytes)} are free; "
        "make room, or choose another disk with --output"
    )


def disk_full(*, folder: Path, why: str, num_done: int, num_layers: int) -> UserError:
    return UserError(
        f"{folder}: {why}, after {num_done} of {num_layers} layers, which are whole and can be "
        "served; make room and run this again to go on, or choose another disk with --output"
    )


def cannot_write(*, folder: Path, why: str) -> UserError:
    return UserError(
        f"{folder}: {why}; choose another folder with --output, and serve with --packed-experts FOLDER"
    )


def packed_by_another(*, folder: Path) -> UserError:
    return UserError(
        f"{folder}: another python -m sglmoe.pack writes there now; wait for it, or choose another folder with --output"
    )
