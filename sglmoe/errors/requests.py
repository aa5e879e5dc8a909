"""What a request is answered with that can't be served, and a control message that asks for what does not exist."""

from collections.abc import Sequence

from sglmoe.errors.user_error import UserError


def unsupported_field(*, name: str) -> UserError:
    return UserError(f"{name} is not supported by this server; send the request without it")


def beam_search() -> UserError:
    return UserError("beam_width > 1 is not supported by this server; use n instead")


def embeddings() -> UserError:
    return UserError(
        "this server generates text; it has no embeddings: use unmodified SGLang with --is-embedding"
    )


def empty_prompt() -> UserError:
    return UserError("the prompt is empty; send at least one token in text or input_ids")


def prompt_too_long(
    *, num_tokens: int, max_tokens: int, kv_tokens: int, context_tokens: int
) -> UserError:
    message = (
        f"Input length ({num_tokens} tokens) exceeds the maximum allowed length "
        f"({max_tokens} tokens). Use a shorter input or enable --allow-auto-truncate."
    )
    if kv_tokens < context_tokens:
        message += (
            f" KV memory holds {kv_tokens} tokens, the model's context is "
            f"{context_tokens}: --memory-budget raises the former."
        )
    return UserError(message)


def token_outside_vocabulary(*, token_id: int, vocab_size: int) -> UserError:
    return UserError(
        f"input_ids contain {token_id}, which is outside of the vocabulary of {vocab_size} tokens"
    )


def output_too_long(*, prompt_tokens: int, max_new_tokens: int, kv_tokens: int) -> UserError:
    return UserError(
        f"prompt ({prompt_tokens} tokens) and max_new_tokens ({max_new_tokens}) together can never fit: KV memory "
        f"holds {kv_tokens} tokens. Lower max_new_tokens or raise --memory-budget."
    )


def logprobs_behind_prompt(*, start: int, prompt_tokens: int) -> UserError:
    return UserError(
        f"logprob_start_len ({start}) is higher than the number of input tokens ({prompt_tokens})"
    )


def routing_behind_prompt(*, start: int, prompt_tokens: int) -> UserError:
    return UserError(
        f"routed_experts_start_len ({start}) must be between 0 and the number of input tokens ({prompt_tokens})"
    )


def rid_in_use(*, rid: str) -> UserError:
    return UserError(f"a request with rid {rid!r} is running; send another rid, or none")


def bad_stop_regex(*, regex: str, why: str) -> UserError:
    return UserError(f"invalid stop_regex {regex!r}: {why}")


def no_grammars() -> UserError:
    return UserError(
        "json_schema, regex, ebnf and structural_tag need a grammar backend and a tokenizer: "
        "start the server without --grammar-backend none and --skip-tokenizer-init"
    )


# ----------------------------------------------------------------------------------------- found only while it is served


def unreadable_request(*, why: str) -> UserError:
    return UserError(
        f"the request could not be read: {why}; please report this, with the server's log",
        status=500,
    )


def never_fits(*, num_tokens: int, num_pages: int, available_pages: int) -> UserError:
    return UserError(
        f"The request's {num_tokens} tokens take {num_pages} KV pages, but only "
        f"{available_pages} are available although nothing else runs. Raise --memory-budget.",
        status=503,
    )


def no_longer_fits(*, num_tokens: int, kv_tokens: int) -> UserError:
    return UserError(
        f"The request's prompt and max_new_tokens come to {num_tokens} tokens, but the worker had to be replaced, and KV "
        f"memory of the new one holds {kv_tokens}. Free memory on the machine, or raise --memory-budget.",
        status=503,
    )


def fatal(*, num_deaths: int, cause: str) -> UserError:
    return UserError(
        f"The worker died {num_deaths} times in a row while it was at work for this request, the last time for it "
        f"alone. The request is given up; others go on. The last time: {cause}",
        status=500,
    )


def going_down(*, cause: str) -> UserError:
    return UserError(f"The server is going down: {cause}", status=503)


# ---------------------------------------------------------------------------------------------------- control messages


def weights_stay() -> UserError:
    return UserError(
        "weights cannot be changed while the server runs; restart it with other weights (--model-path)"
    )


def no_weight_checks() -> UserError:
    return UserError(
        "checking weights is not supported by this server; compare the files of --model-path"
    )


def no_hierarchical_cache() -> UserError:
    return UserError(
        "hierarchical cache is not supported by this server; --memory-budget makes room for more prefixes"
    )


def no_adapters() -> UserError:
    return UserError(
        "LoRA adapters are not supported by this server; merge them into the checkpoint"
    )


def no_corpus() -> UserError:
    return UserError(
        "speculative decoding with an external corpus is not supported by this server; use unmodified SGLang"
    )


def one_device() -> UserError:
    return UserError("this server runs on one device; start one server for each device")


def no_dumper() -> UserError:
    return UserError(
        "the tensor dumper is not supported by this server; use --debug-tensor-dump-output-folder"
    )


def no_such_call(*, method: str) -> UserError:
    return UserError(f"{method} cannot be called on this server; use unmodified SGLang")


def profile_by_hand() -> UserError:
    return UserError(
        "start_step, num_steps and profile_by_stage are not supported; stop it yourself"
    )


def profile_running() -> UserError:
    return UserError("a profile is running already; stop it first")


def no_profile() -> UserError:
    return UserError("no profile is running; start one with /start_profile")


def unknown_activities(*, given: Sequence[str], known: Sequence[str]) -> UserError:
    return UserError(f"activities {', '.join(given)} are unknown; use {', '.join(known)}")


def nothing_recorded() -> UserError:
    return UserError("nothing was recorded: no request ran; send some before you dump")


def no_recording() -> UserError:
    return UserError("no recording was started; start one with /start_expert_distribution_record")


def nothing_to_record() -> UserError:
    return UserError(
        "the model has no experts, so there is no routing to record; use another model"
    )


def requests_running() -> UserError:
    return UserError(
        "requests are running; a recording starts with an empty memory, try again when they are done"
    )


def requests_pending(*, num_queued: int, num_running: int) -> UserError:
    return UserError(
        f"requests are pending: {num_queued} queued, {num_running} running; ask again when they are done, or with "
        "?timeout=SECONDS"
    )


def worker_lost(*, cause: str) -> UserError:
    return UserError(f"the worker was lost, ask again: {cause}")


def worker_being_replaced() -> UserError:
    return UserError("the worker is being replaced; ask again")
