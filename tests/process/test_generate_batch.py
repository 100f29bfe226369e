"""Many prompts at once: tokens of transformers' own continuous batching and of each prompt alone, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

import lingualinked as ll
from waiting import num_sessions, wait_until

pytestmark = pytest.mark.process

GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
SMALL = ContinuousBatchingConfig(num_blocks=16, page_size=64, max_batch_tokens=64)  # else it takes half of the memory
SPANS = [("a", 0, 2), ("b", 2, 4)]


def make_prompts(number: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[1, *rng.choices(range(3, 128), k=rng.randint(1, longest))] for _ in range(number)]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Nothing of a batch is left when it has ended."""
    yield
    gc.collect()
    wait_until(lambda: not any(each.name.startswith("lingualinked-batching") for each in threading.enumerate()))


def alone(model: PreTrainedModel, prompt: list[int], max_new_tokens: int = 12) -> list[int]:
    settings = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=max_new_tokens, **settings)
    return ids[0, len(prompt) :].tolist()


def tokens(outputs: dict[str, GenerationOutput]) -> list[list[int]]:
    assert [each.error for each in outputs.values()] == [None] * len(outputs)
    return [each.generated_tokens for each in outputs.values()]


def test_tokens_are_those_of_transformers_and_of_each_prompt_alone(sharded: Any, unsharded: PreTrainedModel) -> None:
    prompts = make_prompts(8)
    ours = sharded.generate_batch(prompts, GREEDY)
    theirs = unsharded.generate_batch(prompts, GREEDY, SMALL)
    assert tokens(ours) == tokens(theirs) == [alone(unsharded, prompt) for prompt in prompts]
    assert list(ours) == list(theirs)
    for name, output in ours.items():
        assert type(output) is GenerationOutput
        assert output.prompt_ids == theirs[name].prompt_ids
        assert output.status == RequestStatus.FINISHED
        assert 0 < output.created_time <= output.lifespan[0] < output.lifespan[1]
    wait_until(lambda: num_sessions(sharded) == [0, 0, 0])


def test_hundreds_of_prompts_from_several_threads(sharded: Any, unsharded: PreTrainedModel) -> None:
    prompts = make_prompts(120, longest=12)
    parts: dict[int, list[list[int]]] = {}

    def run(part: int) -> None:
        parts[part] = tokens(sharded.generate_batch(prompts[part::3], GREEDY, max_new_tokens=4))

    threads = [threading.Thread(target=run, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    beside = sharded.generate(torch.tensor([prompts[0]]), max_new_tokens=4, do_sample=False, eos_token_id=2)
    for thread in threads:
        thread.join()
    expected = [alone(unsharded, prompt, 4) for prompt in prompts]
    assert [parts[part] for part in range(3)] == [expected[part::3] for part in range(3)]
    assert beside[0, len(prompts[0]) :].tolist() == expected[0]


def test_settings_and_results_of_transformers_have_their_effect(sharded: Any, unsharded: PreTrainedModel) -> None:
    prompts = make_prompts(4)
    config = ContinuousBatchingConfig(num_blocks=16, page_size=64, max_batch_tokens=32, return_logprobs=True)
    for scheduler in ("fifo", "prefill_first"):
        config.scheduler_type = scheduler
        ours = sharded.generate_batch(prompts, GREEDY, config, record_timestamps=True)
        theirs = unsharded.generate_batch(prompts, GREEDY, config, record_timestamps=True)
        assert tokens(ours) == tokens(theirs)
        for our, their in zip(ours.values(), theirs.values(), strict=True):
            assert our.logprobs == pytest.approx(their.logprobs, abs=1e-5)
            assert len(our.timestamps) == len(our.generated_tokens)
            assert our.timestamps == sorted(our.timestamps)


def test_several_sequences_of_a_prompt(sharded: Any, unsharded: PreTrainedModel) -> None:
    config = GenerationConfig(max_new_tokens=6, do_sample=True, top_k=1, eos_token_id=2, num_return_sequences=3)
    prompts = [*make_prompts(2), [5]]
    ours = sharded.generate_batch(prompts, config)
    assert list(ours) == list(unsharded.generate_batch(prompts, config, SMALL))
    assert tokens(ours) == [alone(unsharded, prompt, 6) for prompt in prompts for _ in range(3)]


def test_sampled_tokens_depend_on_the_seed_alone(sharded: Any) -> None:
    config = GenerationConfig(max_new_tokens=8, do_sample=True, temperature=0.8, top_k=20, top_p=0.9, eos_token_id=-1)
    prompts = make_prompts(6)
    seeded = ContinuousBatchingConfig(seed=5)
    first = tokens(sharded.generate_batch(prompts, config, seeded))
    assert first == tokens(
        sharded.generate_batch(prompts, config, ContinuousBatchingConfig(seed=5, max_batch_tokens=8))
    )
    assert first != tokens(sharded.generate_batch(prompts, config, ContinuousBatchingConfig(seed=6)))
    torch.manual_seed(3)
    drawn = tokens(sharded.generate_batch(prompts, config))
    torch.manual_seed(3)
    assert drawn == tokens(sharded.generate_batch(prompts, config))


def test_each_request_has_its_own_processors(sharded: Any) -> None:
    config = GenerationConfig(max_new_tokens=8, do_sample=True, temperature=0.5, top_k=9, eos_token_id=-1)
    settings = ContinuousBatchingConfig(seed=1, per_request_processors=True)
    prompt = make_prompts(1)[0]
    with sharded.continuous_batching_context_manager(config, continuous_batching_config=settings) as manager:
        manager.add_request(prompt, "greedy", top_k=1)
        manager.add_request(prompt, "refused", no_such_thing=1)
        manager.add_request(prompt, "wild", temperature=50.0, top_k=128)
        outputs = {output.request_id: output for output in (manager.get_result() for _ in range(3))}
    expected = sharded.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert outputs["greedy"].generated_tokens == expected[0, len(prompt) :].tolist() != outputs["wild"].generated_tokens
    assert outputs["refused"].status == RequestStatus.FAILED
    assert outputs["refused"].error.startswith("ValueError: Unknown logit_processor_kwargs")


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with")  # transformers' manager causes it, too
def test_processors_that_read_the_text_run_here(sharded: Any, unsharded: PreTrainedModel) -> None:
    settings = {"max_new_tokens": 8, "do_sample": False, "repetition_penalty": 1.9, "pad_token_id": 0}
    prompts = make_prompts(3)
    config = GenerationConfig(**settings, eos_token_id=-1)
    kept = ContinuousBatchingConfig(drop_unsupported_processors=False)
    ours = tokens(sharded.generate_batch(prompts, config, kept))
    for prompt, our in zip(prompts, ours, strict=True):
        expected = unsharded.generate(torch.tensor([prompt]), **settings, eos_token_id=None)
        assert our == expected[0, len(prompt) :].tolist()


def test_tokens_are_streamed_and_handled_on_an_event_loop(sharded: Any, unsharded: PreTrainedModel) -> None:
    prompts = make_prompts(3)

    async def serve(manager: Any) -> dict[str, list[list[int]]]:
        seen: dict[str, list[list[int]]] = {name: [] for name in "abc"}
        ends = [asyncio.Event() for _ in prompts]
        for name, prompt, end in zip("abc", prompts, ends, strict=True):

            def handle(output: GenerationOutput, name: str = name, end: asyncio.Event = end) -> None:
                seen[name].append(output.generated_tokens)
                if output.is_finished():
                    end.set()

            manager.register_result_handler(name, handle)
            manager.add_request(prompt, name, streaming=name != "c")
        await asyncio.gather(*(end.wait() for end in ends))
        return seen

    with sharded.continuous_batching_context_manager(GREEDY) as manager:
        seen = asyncio.run(serve(manager))
        request = manager.add_request(prompts[0], streaming=True)
        streamed = [output.generated_tokens for output in manager.request_id_iter(request)]
    for name, prompt in zip("abc", prompts, strict=True):
        expected = alone(unsharded, prompt)
        assert seen[name] == ([expected] if name == "c" else [expected[: n + 1] for n in range(len(expected))])
    assert streamed == seen["a"]


def test_requests_are_cancelled_and_others_go_on(sharded: Any, unsharded: PreTrainedModel) -> None:
    prompts = make_prompts(3)
    config = GenerationConfig(max_new_tokens=400, do_sample=False, eos_token_id=-1)
    with sharded.continuous_batching_context_manager(config) as manager:
        manager.add_request(prompts[0], "long", streaming=True)
        assert manager.get_result().status == RequestStatus.DECODING
        manager.cancel_request("long")
        wait_until(lambda: not manager._priorities)
        name = manager.add_request(prompts[1], max_new_tokens=5, eos_token_id=2)
        while (output := manager.get_result()).request_id != name:
            pass
        manager.cancel_request("no such request")
    assert output.generated_tokens == alone(unsharded, prompts[1], 5)


def test_a_pause_holds_everything_and_loses_nothing(sharded: Any, unsharded: PreTrainedModel) -> None:
    prompts = make_prompts(2)
    with sharded.continuous_batching_context_manager(GREEDY) as manager:
        names = [manager.add_request(prompt, streaming=True) for prompt in prompts]
        outputs = [manager.get_result()]
        with manager.pause():
            with pytest.raises(RuntimeError, match="inside a pause"):
                manager.stop()
            steps = len(sharded.telemetry.steps)
            time.sleep(0.05)
            assert len(sharded.telemetry.steps) == steps
        while sum(output.is_finished() for output in outputs) < 2:
            outputs.append(manager.get_result())
    last = {output.request_id: output.generated_tokens for output in outputs}
    assert [last[name] for name in names] == [alone(unsharded, prompt) for prompt in prompts]


def test_a_manager_may_be_kept(place: Callable[..., Any], tiny_llama: str, unsharded: PreTrainedModel) -> None:
    model, prompts = place(tiny_llama, SPANS), make_prompts(3)
    first = model.generate_batch(prompts, GREEDY, persistent_manager=True)
    kept = model._cached_continuous_batching_manager
    assert not kept.is_running()
    assert tokens(model.generate_batch(prompts)) == tokens(first) == [alone(unsharded, each) for each in prompts]
    model.generate_batch(prompts, persistent_manager=True)
    assert model.init_continuous_batching() is kept
    # other settings have their effect, and leave the kept one as it is
    longer = GenerationConfig(max_new_tokens=14, do_sample=False, eos_token_id=2, pad_token_id=0)
    expected = [alone(unsharded, each, 14) for each in prompts]
    assert tokens(model.generate_batch(prompts, longer)) == expected
    assert model.init_continuous_batching(GREEDY, ContinuousBatchingConfig()) is kept
    assert model.init_continuous_batching(GREEDY, SMALL) is not kept
    assert tokens(model.generate_batch(prompts, longer, persistent_manager=True)) == expected
    assert model.init_continuous_batching(longer) is model.init_continuous_batching() is not kept
    model.destroy_cached_continuous_batching_manager()
    assert model.init_continuous_batching() is not kept


def test_a_step_that_fails_as_a_whole_fails_its_requests_alone(
    place: Callable[..., Any], tiny_llama: str, unsharded: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in a worker, and one that the caller can't send; others go on with the KV that they have."""
    model, prompts = place(tiny_llama, SPANS), make_prompts(16)
    steps, sent = model._pipeline.packed_steps, []
    start, make_step = steps.start, steps._make_step

    def start_some(parts: Any, adapters: Any = None) -> Any:
        sent.append({part.session for part in parts})
        if len(sent) == 14:
            raise ll.StepTimeoutError("the sessions of a packed step have no common route")
        return start(parts, adapters)

    def make_some(*args: Any) -> Any:
        step = make_step(*args)
        return msgspec.structs.replace(step, torch_settings=(("unknown", True),)) if len(sent) == 5 else step

    monkeypatch.setattr(steps, "start", start_some)
    monkeypatch.setattr(steps, "_make_step", make_some)
    limits = ContinuousBatchingConfig(max_requests_per_batch=3)
    outputs = [*model.generate_batch(prompts, GREEDY, limits).values()]
    errors = [output.error for output in outputs if output.error]
    assert sent[4].isdisjoint(sent[13])
    assert sum("no common route" in error for error in errors) == len(sent[13])
    assert sum("WorkerError" in error for error in errors) == len(sent[4])
    assert len(errors) == len(sent[4]) + len(sent[13]) < len(prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.error or output.generated_tokens == alone(unsharded, prompt)
    wait_until(lambda: num_sessions(model) == [0, 0])


def test_common_beginnings_are_copied(place: Callable[..., Any], tiny_llama: str, unsharded: PreTrainedModel) -> None:
    model, rng = place(tiny_llama, SPANS), random.Random(0)
    common = [1, *rng.choices(range(3, 128), k=80)]
    prompts = [[*common, *rng.choices(range(3, 128), k=5)] for _ in range(6)]
    with model.continuous_batching_context_manager(GREEDY) as manager:
        names = manager.add_requests(prompts)
        outputs = {output.request_id: output for output in (manager.get_result() for _ in names)}
        computed = sum(step.tokens * step.rows for step in model.telemetry.steps)
        last = manager.add_request([*common, 7])
        assert manager.get_result().generated_tokens == alone(unsharded, [*common, 7])
        assert last not in outputs
    assert [outputs[name].generated_tokens for name in names] == [alone(unsharded, prompt) for prompt in prompts]
    num_new = sum(len(output.generated_tokens) - 1 for output in outputs.values())
    assert computed == len(common) + 6 * 5 + num_new
    wait_until(lambda: num_sessions(model) == [0, 0])


def test_requests_wait_for_room_and_share_it(
    place: Callable[..., Any], tiny_llama: str, unsharded: PreTrainedModel
) -> None:
    model, prompts = place(tiny_llama, SPANS, max_kv_tokens=120), make_prompts(9)
    outputs = model.generate_batch(prompts, GREEDY)
    assert tokens(outputs) == [alone(unsharded, prompt) for prompt in prompts]
    with model.continuous_batching_context_manager(GREEDY) as manager:
        manager.add_request([1] * 115, "too long")
        manager.add_request([1] * 90, "kept", max_new_tokens=1)
        outputs = {output.request_id: output for output in (manager.get_result(), manager.get_result())}
        assert outputs["too long"].error.startswith("KVCapacityError: the request needs room for 126 tokens of KV")
        # What is only kept gives way to a call of `generate` beside it.
        ids = torch.tensor([prompts[0]])
        assert model.generate(ids, max_new_tokens=60, do_sample=False, eos_token_id=None).shape[1] == ids.shape[1] + 60


def test_layers_move_while_prompts_are_answered(
    place: Callable[..., Any], tiny_llama: str, unsharded: PreTrainedModel
) -> None:
    model, prompts = place(tiny_llama, SPANS), make_prompts(24)
    config = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=-1, pad_token_id=0)
    answers: list[dict[str, GenerationOutput]] = []
    thread = threading.Thread(target=lambda: answers.append(model.generate_batch(prompts, config)))
    thread.start()
    for spans in ([("a", 0, 3), ("c", 3, 4)], [("d", 0, 1), ("b", 1, 4)]):
        model.rebalance(ll.Plan.from_spans(spans))
    thread.join()
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt, output in zip(prompts, answers[0].values(), strict=True):
        assert (
            output.generated_tokens == unsharded.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
        )
    assert model.plan.devices == ("d", "b")


def test_what_can_not_be_done_is_refused_by_name(sharded: Any) -> None:
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ll.UnsupportedOperationError, "cpu_offload_space=1.0", {"cpu_offload_space": 1.0}),
        (ll.UnsupportedOperationError, "max_memory_percent=0.5", {"max_memory_percent": 0.5}),
        (ll.UnsupportedOperationError, "use_cuda_graph=True", {"use_cuda_graph": True}),
        (ll.UnsupportedOperationError, "default_compile_level=1", {"default_compile_level": 1}),
        (ll.UnsupportedOperationError, "q_padding_interval_size=64", {"q_padding_interval_size": 64}),
        (ll.ArgumentError, "scheduler_type='lifo'", {"scheduler_type": "lifo"}),
        (ll.ArgumentError, "safety_margin=2", {"safety_margin": 2}),
        (ll.ArgumentError, "num_blocks=0", {"num_blocks": 0}),
    ]
    for kind, text, settings in refused:
        with pytest.raises(kind, match=text):
            sharded.generate_batch([[1]], GREEDY, ContinuousBatchingConfig(**settings))
    for text, generation in (("beam", {"num_beams": 2}), ("max_time=1", {"max_time": 1.0})):
        with pytest.raises(ll.UnsupportedOperationError, match=text):
            sharded.generate_batch([[1]], GenerationConfig(max_new_tokens=2, **generation))
    for prompts, text in (([[]], "at least one id"), ([[1, 128]], "from 1 to 128"), ([["a"]], "token ids")):
        with pytest.raises(ll.ArgumentError, match=text):
            sharded.generate_batch(prompts, GREEDY)
    for prompts, text in (([1, 2], "list of prompts, each a list of token ids"), (None, "list of prompts")):
        with pytest.raises(ll.ArgumentError, match=text):
            sharded.generate_batch(prompts, GREEDY)
    with pytest.raises(ll.ArgumentError, match="number of new tokens"):
        sharded.generate_batch([[1]], GREEDY, max_new_tokens="3")
    for generation, settings, text in (
        ({"max_new_tokens": 3}, None, "generation_config=.* is a dict: give a GenerationConfig"),
        (GREEDY, {"num_blocks": 3}, "continuous_batching_config=.* is a dict"),
        (
            GenerationConfig(max_length=12, eos_token_id=2),
            None,
            "max_length=12 ends no request .*: give max_new_tokens",
        ),
        (GenerationConfig(eos_token_id=-1), None, "no text would ever end"),
    ):
        with pytest.raises(ll.ArgumentError, match=text):
            sharded.generate_batch([[1]], generation, settings)
    with pytest.raises(ll.ArgumentError, match="max_length=12"):
        sharded.generate(torch.tensor([[1]]), cache_implementation="paged", max_length=12)
    with pytest.raises(ll.ArgumentError, match="unknown argument 'top_k' of generate_batch"):
        sharded.generate_batch([[1]], GREEDY, top_k=3)
    handle = sharded.lm_head.register_forward_hook(print)
    with pytest.raises(ll.UnsupportedOperationError, match="hooks are registered"):
        sharded.generate_batch([[1]], GREEDY)
    handle.remove()
    with sharded.capture("lm_head"), pytest.raises(ll.UnsupportedOperationError, match=r"a block of capture\(\)"):
        sharded.generate_batch([[1]], GREEDY)
    with sharded.continuous_batching_context_manager(GREEDY) as manager:
        manager.add_request([1], "taken", max_new_tokens=300, eos_token_id=-1)
        with pytest.raises(ll.ArgumentError, match="request_id='taken' is in use"):
            manager.add_request([1], "taken")
        for priority in (None, "high", float("nan")):
            with pytest.raises(ll.ArgumentError, match="must be an integer"):
                manager.add_request([1], priority=priority)
        manager.cancel_request(["taken"])
        served = manager.add_request([1], max_new_tokens=1, streaming=True)
        assert [each.error for each in manager.request_id_iter(served)] == [None]
        manager.stop(hard_stop=True)
        with pytest.raises(ll.ClosedError, match="takes no requests"):
            manager.add_request([1])
        assert manager.get_result().error.startswith("ClosedError: the manager was stopped")


def test_generate_with_a_paged_cache(sharded: Any, unsharded: PreTrainedModel) -> None:
    ids = torch.tensor([[1, 17, 93], [5, 6, 7]])
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "cache_implementation": "paged"}
    ours = sharded.generate(ids, **settings)
    assert ours.shape == (1, 2, 8)
    plain = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert ours[0].tolist() == [unsharded.generate(row[None], **plain)[0].tolist() for row in ids]
    with pytest.raises(ll.UnsupportedOperationError, match="streamer"):
        sharded.generate(ids, streamer=object(), **settings)
    with pytest.raises(ll.UnsupportedOperationError, match="without padding"):
        sharded.generate(ids, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]), **settings)


def test_an_interrupt_leaves_nothing_behind(place: Callable[..., Any], tiny_llama: str) -> None:
    model, seen = place(tiny_llama, SPANS), threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        wait_until(lambda: min(num_sessions(model)) > 0)
        signal.pthread_kill(main, signal.SIGINT)
        seen.set()

    thread = threading.Thread(target=interrupt)
    thread.start()
    config = GenerationConfig(max_new_tokens=400, do_sample=False, eos_token_id=-1)
    with pytest.raises(KeyboardInterrupt):
        model.generate_batch(make_prompts(200), config)
    thread.join()
    wait_until(lambda: num_sessions(model) == [0, 0])
    assert len(model.generate_batch([[1]], GREEDY)) == 1


@pytest.mark.filterwarnings(
    "ignore:Passing `repetition_penalty`"
)  # of transformers, which makes its processors without a prompt
@pytest.mark.parametrize("at", ["stage", "caller"])
def test_a_request_whose_tokens_can_not_be_chosen_fails_alone(sharded: Any, at: str) -> None:
    """By settings of its own which transformers does not refuse; ``at`` says who chooses."""
    config = GenerationConfig(
        max_new_tokens=3,
        do_sample=True,
        temperature=0.7,
        eos_token_id=-1,
        repetition_penalty=1.1 if at == "caller" else 1.0,
    )
    each_its_own = ContinuousBatchingConfig(per_request_processors=True)
    with sharded.continuous_batching_context_manager(config, continuous_batching_config=each_its_own) as manager:
        names = [manager.add_request([1, 5, 17], temperature=value) for value in (0.7, 1e-45, 1.3, "warm", 0.9)]
        outputs = {output.request_id: output for output in (manager.get_result() for _ in names)}
    errors = [outputs[name].error or "" for name in names]
    assert ["probability" in error for error in errors] == [False, True, False, False, False]
    assert [len(outputs[name].generated_tokens) for name in names] == [3, 0, 3, 0, 3]
    assert errors[3].startswith("TypeError")
    wait_until(lambda: num_sessions(sharded) == [0, 0, 0])


def test_an_interrupt_of_the_wait_at_the_end(place: Callable[..., Any], tiny_llama: str) -> None:
    """With a manager that is still referenced: its requests fail, and nothing goes on."""
    model, main = place(tiny_llama, SPANS), threading.main_thread().ident
    config = GenerationConfig(max_new_tokens=400, do_sample=False, eos_token_id=-1)

    def interrupt() -> None:
        wait_until(lambda: min(num_sessions(model)) > 0)
        signal.pthread_kill(main, signal.SIGINT)

    thread, managers = threading.Thread(target=interrupt), []

    def serve() -> None:
        with model.continuous_batching_context_manager(config) as manager:
            managers.append(manager)
            manager.add_requests(make_prompts(200))
            thread.start()

    with pytest.raises(KeyboardInterrupt):
        serve()
    thread.join()
    assert not managers[0].is_running()
    wait_until(lambda: num_sessions(model) == [0, 0])


def test_a_closed_model_ends_all_requests(place: Callable[..., Any], tiny_llama: str) -> None:
    model = place(tiny_llama, SPANS)
    config = GenerationConfig(max_new_tokens=400, do_sample=False, eos_token_id=-1)
    manager = model.init_continuous_batching(config)
    manager.start()
    names = {manager.add_request(prompt) for prompt in make_prompts(20)}
    wait_until(lambda: min(num_sessions(model)) > 0)
    model.close()
    outputs = {output.request_id: output for output in (manager.get_result() for _ in names)}
    assert outputs.keys() == names
    assert {output.error.partition(":")[0] for output in outputs.values()} == {"ClosedError"}
    wait_until(lambda: not manager.is_running())
    manager.stop()


def test_a_manager_that_nobody_holds_ends(sharded: Any) -> None:
    manager = sharded.init_continuous_batching(GenerationConfig(max_new_tokens=400, eos_token_id=-1))
    manager.start()
    manager.add_request([1, 5])
    del manager
    gc.collect()
    wait_until(lambda: num_sessions(sharded) == [0, 0, 0])


@pytest.mark.parametrize("when", ["in steps", "idle"])
def test_a_worker_that_dies_fails_every_request(tiny_llama: str, when: str) -> None:
    with ll.ShardedModel.from_pretrained(tiny_llama, devices=2, plan="even", progress=False) as model:
        config = GenerationConfig(max_new_tokens=400, do_sample=False, eos_token_id=-1)
        manager = model.init_continuous_batching(config)
        manager.start()
        if when == "in steps":
            names = {manager.add_request(prompt) for prompt in make_prompts(5)}
            wait_until(lambda: min(num_sessions(model)) > 0)
        pids = [worker.pid for worker in model.cluster.workers()]
        os.kill(pids[1], signal.SIGKILL)
        if when == "idle":
            wait_until(lambda: len(model._pipeline.ended_devices) == 1)
            names = {manager.add_request([1, 5])}
        outputs = {output.request_id: output for output in (manager.get_result() for _ in names)}
        assert outputs.keys() == names
        assert {output.error.partition(":")[0] for output in outputs.values()} == {"WorkerDiedError"}
        with pytest.raises(ll.ClosedError, match="takes no requests"):
            manager.add_request([1])
        manager.stop()
