"""What SGLang's configuration means to us: the process, the tokenizer, settings and rules.

One of the files that know SGLang. Reads its flags and environment variables, so that nobody else has to.
"""

import faulthandler
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import setproctitle
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.parser.reasoning_parser import ReasoningParser
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import (
    SpawnRanks,
    get_device,
    get_exec,
    get_model,
    get_schedule,
    get_serving,
    publish,
)
from sglang.srt.sampling.sampling_params import get_request_reasoning_end_token_ids
from sglang.srt.utils import (
    configure_logger,
    kill_itself_when_parent_died,
    suppress_other_loggers,
)
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from sglmoe.config import EngineConfig
from sglmoe.errors.options import not_a_choice
from sglmoe.protocol import Limits
from sglmoe.scheduler.finish import Decode
from sglmoe.scheduler.frontend_request import RequestRules
from sglmoe.scheduler.passes import PassSettings
from sglmoe.scheduler.policy import Order, PolicySettings
from sglmoe.scheduler.reasoning import ReasoningCounter
from sglmoe.scheduler.settings import SchedulerSettings

# By this, SGLang's launcher knows whom to let leave before it kills what is left.
PROCESS_TITLE = "sglang::scheduler"
ORDERS = ("fcfs", "lpm", "lof", "random")


def enter_process(server_args: Any, *, gpu_id: int, dp_rank: int | None) -> None:
    """Make this process one of SGLang's: plugins, published configuration, name, logging."""
    load_plugins()
    ranks = SpawnRanks(world_rank=0, dp_rank=dp_rank, gpu_id=gpu_id)
    publish(server_args, role="scheduler", ranks=ranks)
    kill_itself_when_parent_died()
    setproctitle.setproctitle(PROCESS_TITLE)
    faulthandler.enable()
    configure_logger(server_args)
    suppress_other_loggers()


def scheduler_settings(config: EngineConfig) -> SchedulerSettings:
    """The published flags, and ours, as scheduling knows them. Raises ValueError for a policy that there is not."""
    flags = get_schedule()
    if flags.schedule_policy not in ORDERS:
        raise not_a_choice(flag="--schedule-policy", given=flags.schedule_policy, choices=ORDERS)
    preempts = flags.enable_priority_scheduling and not flags.disable_priority_preemption
    ratio = min(envs.SGLANG_INIT_NEW_TOKEN_RATIO.get() * flags.schedule_conservativeness, 1.0)
    min_ratio = min(ratio * envs.SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR.get(), 1.0)
    return SchedulerSettings(
        policy=PolicySettings(
            max_running=flags.max_running_requests or 1 << 30,
            max_prefill_tokens=flags.max_prefill_tokens,
            chunk_tokens=_chunk_tokens(flags.chunked_prefill_size),
            order=cast(Order, flags.schedule_policy),
            mix_decode=flags.enable_mixed_chunk,
            preemption_threshold=(
                flags.priority_scheduling_preemption_threshold if preempts else None
            ),
            passes=_pass_settings(config),
            expert_affinity=config.expert_affinity,
        ),
        use_priority=flags.enable_priority_scheduling,
        low_values_first=flags.schedule_low_priority_values_first,
        max_queued=flags.max_queued_requests,
        waiting_timeout_seconds=_seconds(envs.SGLANG_REQ_WAITING_TIMEOUT.get()),
        running_timeout_seconds=_seconds(envs.SGLANG_REQ_RUNNING_TIMEOUT.get()),
        watchdog_seconds=_seconds(get_device().watchdog_timeout),
        new_token_ratio=ratio,
        min_new_token_ratio=min_ratio,
        new_token_ratio_decay=(ratio - min_ratio) / envs.SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS.get(),
    )


def _pass_settings(config: EngineConfig) -> PassSettings:
    """Where prompts are cut moves last bits, so that inference that has to be deterministic does without times."""
    deterministic = get_exec().deterministic.enable_deterministic_inference
    return PassSettings(
        fill=config.fill_passes and not deterministic,
        ttft_seconds=config.ttft_target_seconds,
        itl_seconds=config.itl_target_seconds,
    )


def _chunk_tokens(value: int | None) -> int | None:
    """SGLang writes "no chunks" as -1 too."""
    return value if value is not None and value > 0 else None


def _seconds(value: float | None) -> float | None:
    """SGLang writes "never" as -1 or 0 too."""
    return value if value is not None and value > 0 else None


class TextSide(msgspec.Struct, frozen=True):
    """What is known of the model's tokens and text. `tokenizer` is None with --skip-tokenizer-init."""

    tokenizer: Any
    eos_ids: frozenset[int]
    replacement_id: int | None
    reasoning: "ReasoningIds"

    def decode(self) -> Decode:
        if self.tokenizer is None:
            return _no_text
        decode: Decode = self.tokenizer.decode
        return decode

    def request_rules(self, limits: Limits) -> RequestRules:
        serving = get_serving()
        return RequestRules(
            limits=limits,
            eos_ids=self.eos_ids,
            replacement_id=self.replacement_id,
            stream_interval=serving.stream_interval,
            truncate_prompts=serving.allow_auto_truncate,
            max_new_tokens_limit=envs.SGLANG_MAX_NEW_TOKENS_LIMIT.get(),
            count_reasoning=self.reasoning.counter_for,
        )


class ReasoningIds(msgspec.Struct, frozen=True):
    """The tokens between which the model reasons; all empty for a model that does not."""

    end_ids: tuple[int, ...] = ()
    start_ids: tuple[int, ...] = ()  # of models that open the reasoning themselves
    selectable_ends: tuple[tuple[int, ...], ...] = ()  # a request may name one of these

    def counter_for(self, message: TokenizedGenerateReqInput) -> ReasoningCounter | None:
        if not message.require_reasoning:
            if not self.start_ids:
                return None
            return ReasoningCounter(end_ids=self.end_ids, start_ids=self.start_ids)
        named = get_request_reasoning_end_token_ids(
            message.sampling_params.custom_params, allowed_sequences=self.selectable_ends
        )
        end_ids = named or self.end_ids
        return ReasoningCounter(end_ids=end_ids) if end_ids else None


def load_text_side(server_args: Any) -> TextSide:
    """Read the tokenizer and the model's configuration from the checkpoint."""
    model_eos = ModelConfig.from_server_args(server_args).hf_eos_token_id or set()
    serving = get_serving()
    tokenizer = None
    if not serving.skip_tokenizer_init:
        tokenizer = get_tokenizer(
            serving.tokenizer_path,
            tokenizer_mode=serving.tokenizer_mode,
            trust_remote_code=get_model().trust_remote_code,
            revision=get_model().revision,
            tokenizer_backend=serving.tokenizer_backend,
        )
    return TextSide(
        tokenizer=tokenizer,
        eos_ids=frozenset(model_eos) | _tokenizer_eos(tokenizer),
        replacement_id=next(iter(model_eos), None),
        reasoning=_reasoning_ids(tokenizer, serving.reasoning_parser),
    )


def _no_text(token_ids: Sequence[int]) -> str:
    raise AssertionError("stop strings were refused without a tokenizer")


def _tokenizer_eos(tokenizer: Any) -> frozenset[int]:
    if tokenizer is None:
        return frozenset()
    # SGLang's get_tokenizer attaches the second one.
    ids = {tokenizer.eos_token_id, *(tokenizer.additional_stop_token_ids or ())}
    return frozenset(ids - {None})


def _reasoning_ids(tokenizer: Any, parser_name: str | None) -> ReasoningIds:
    if tokenizer is None or not parser_name:
        return ReasoningIds()
    parser = ReasoningParser(model_type=parser_name, stream_reasoning=False, tokenizer=tokenizer)
    detector = parser.detector
    end_ids = detector.get_think_end_token_ids(tokenizer)
    if not end_ids:
        return ReasoningIds()
    # Only some detectors have it; this is SGLang's own way to ask.
    selectable = getattr(detector, "request_selectable_think_end_tokens", ())
    return ReasoningIds(
        end_ids=tuple(end_ids),
        start_ids=tuple(detector.get_self_opened_think_start_token_ids(tokenizer) or ()),
        selectable_ends=tuple(
            tuple(tokenizer.encode(token, add_special_tokens=False)) for token in selectable
        ),
    )
