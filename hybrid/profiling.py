"""Running prompts to learn which experts a model uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hybrid.engine.engine import Engine
from hybrid.engine.load import LoadedModel
from hybrid.engine.sequence import FailedRequest
from hybrid.errors import ConfigError, RequestError
from hybrid.gguf import GGUFFile
from hybrid.placement.usage import UsageProfile, identify
from hybrid.sampling_params import SamplingParams


def cut_prompts(
    ids: Sequence[int], length: int, bos_id: int | None, most: int | None = None
) -> list[list[int]]:
    """A text's tokens as prompts of ``length`` tokens that share nothing; what is left over is the last.

    Raises:
        ConfigError: the text has no tokens.
    """
    head = [] if bos_id is None else [bos_id]
    step = max(1, length - len(head))
    prompts = [[*head, *ids[start : start + step]] for start in range(0, len(ids), step)]
    if not prompts:
        raise ConfigError("the text has no tokens; give a longer one")
    return prompts[:most]


def profile_usage(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> UsageProfile:
    """Computes prompts and continues each of them, counting the experts their tokens use.

    ``progress`` gets texts that are finished and in all.

    Raises:
        ConfigError: the model has no routed experts.
        RequestError: a prompt does not fit the context.
    """
    with GGUFFile.open(loaded.path) as file:
        model = identify(file, loaded.header.dims)
    network = loaded.engine.model
    network.count_usage()
    _run(loaded.engine, prompts, params, progress)
    dims = loaded.header.dims
    return UsageProfile(model, dims.num_experts, dims.num_experts_per_tok, network.usage)


def _run(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    progress: Callable[[int, int], None],
) -> None:
    for number, ids in enumerate(prompts):
        engine.add_request(str(number), list(ids), params)
    done = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if isinstance(output, FailedRequest):
                raise RequestError(f"text {output.request_id} failed: {output.error}")
            if output.finish_reason is not None:
                done += 1
                progress(done, len(prompts))
