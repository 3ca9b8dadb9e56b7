"""The engines: the same answers as transformers, many requests at once, nothing left in memory."""

import asyncio
import itertools
import logging
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llava_ray.config import ModelConfig
from llava_ray.engine.detokenizer import Detokenizer
from llava_ray.engine.echo import EchoEngine
from llava_ray.engine.factory import load_engine
from llava_ray.engine.torch_engine.engine import TorchEngine
from llava_ray.engine.torch_engine.execution.attention import Span, group_by_stride
from llava_ray.engine.torch_engine.execution.cuda_graphs import DecodeGraphs
from llava_ray.engine.torch_engine.execution.device_transfer import Stopwatch
from llava_ray.engine.torch_engine.execution.encoder_cache import EncoderCache
from llava_ray.engine.torch_engine.execution.model_runner import (
    ModelRunner,
    skip_unused_vision_layers,
)
from llava_ray.engine.torch_engine.execution.packed_linear import PackedLinear, pack_linears
from llava_ray.engine.torch_engine.execution.sampler import sample
from llava_ray.engine.torch_engine.scheduling.kv_allocator import KVAllocator, KVSlice
from llava_ray.engine.torch_engine.scheduling.scheduler import (
    MIN_SEQUENCES_TO_SPLIT,
    Scheduler,
    StepPlan,
)
from llava_ray.engine.torch_engine.scheduling.sequence import Sequence
from llava_ray.errors import ConfigError, ContextLengthError, EngineError, RequestError
from llava_ray.model.build.random_model import build_byte_tokenizer
from llava_ray.model.loading import load_model
from llava_ray.priority import give_way
from llava_ray.types import Chunk, Sampling
from tests.support.engine_requests import (
    ScriptedRunner,
    answer,
    ask_late,
    load,
    make_sequence,
    mixed_prompts,
    prompt,
    read,
    read_some,
)
from tests.support.tiny_checkpoint import make_image, tiny_model

# ---- the same answers as transformers ----


def test_one_request_at_a_time_gives_the_answer_of_generate(generate):
    async def main():
        engine = load()
        for each in mixed_prompts(6):
            assert await answer(engine, each) == generate(each)
        await engine.close()

    asyncio.run(main())


@pytest.fixture
def two_threads():
    """Give torch two threads, so that the engine computes large steps in parallel."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_steps_side_by_side_give_the_answers_of_generate(generate, two_threads):
    prompts = mixed_prompts(20)

    async def main():
        engine = load(prefill_tokens=64, max_batch_size=12)
        answers = await asyncio.gather(*[answer(engine, each) for each in prompts])
        await engine.close()
        return answers

    assert asyncio.run(main()) == [generate(each) for each in prompts]


def test_steps_of_a_fixed_number_of_tokens_give_the_answers_of_generate(generate, monkeypatch):
    """As a GPU decodes, but for the recording: sequences come and go, and steps are filled up."""
    prompts, sizes = mixed_prompts(12), []
    compute = DecodeGraphs.compute

    def watch(graphs, plan, latest):
        sizes.append(len(plan.scheduled))
        return compute(graphs, plan, latest)

    monkeypatch.setattr(DecodeGraphs, "compute", watch)

    async def main():
        core = load_model(tiny_model(), dtype="float32", device="cpu")
        runner = ModelRunner(core, cache_tokens=16384, max_batch_size=7, uses_graphs=True)
        engine = TorchEngine(core, runner=runner, max_batch_size=7)
        answers = await asyncio.gather(*[answer(engine, each) for each in prompts])
        await engine.check()
        await engine.close()
        return answers

    assert asyncio.run(main()) == [generate(each) for each in prompts]
    assert {1, 3, 7} <= set(sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_answers_of_generate(generate):
    prompts = mixed_prompts(12)

    async def main():
        core = load_model(tiny_model(), dtype="float32", device="cuda")
        engine = TorchEngine(core, max_batch_size=7)
        assert engine._runner._graphs, "decoding is not played from CUDA graphs"
        answers = await asyncio.gather(*[answer(engine, each) for each in prompts])
        await engine.close()
        return answers

    assert asyncio.run(main()) == [generate(each) for each in prompts]


def test_what_another_prompt_waits_for_is_computed_by_all_threads(two_threads):
    async def main():
        engine = load(prefill_tokens=32)
        run, names = engine._runner.run, []

        def tell(plan: StepPlan) -> list[int]:
            names.append(threading.current_thread().name)
            return run(plan)

        engine._runner.run = tell
        texts = [f"USER: {'a long question ' * 12}{end} ASSISTANT:" for end in "xy"]
        await asyncio.gather(*[answer(engine, prompt(text, max_tokens=2)) for text in texts])
        await engine.close()
        return names

    assert set(asyncio.run(main())) == {"torch-engine"}


def wide_scheduler(*lengths: int, **options) -> Scheduler:
    """Return a scheduler with sequences of these prompts; prompts of one token are decoding."""
    defaults = {"cache_tokens": 4096, "max_batch_size": 32, "prefill_tokens": 100}
    scheduler = Scheduler(**defaults | {"prefix_cache": False} | options)
    for length in lengths:
        scheduler.add(make_sequence(length=length, max_tokens=3))
    return scheduler


def finish(scheduler: Scheduler, plan: StepPlan) -> list[tuple[Sequence, Chunk]]:
    scheduler.advance(plan)
    return scheduler.commit(plan, [7] * len(plan.complete))


def test_steps_side_by_side_divide_the_work_and_have_no_sequence_in_common():
    scheduler = wide_scheduler(*[1] * 9, 90, 90)
    first, second = scheduler.plan(share=2), scheduler.plan(share=2)
    assert [scheduled.num_tokens for scheduled in first.scheduled] == [*[1] * 5, 50]
    assert [scheduled.num_tokens for scheduled in second.scheduled] == [*[1] * 4, 50]
    assert len({scheduled.sequence for scheduled in (*first.scheduled, *second.scheduled)}) == 11
    assert scheduler.plan(share=2).scheduled == [], "all is in flight"


def test_a_step_side_by_side_takes_those_whose_last_token_is_oldest():
    scheduler = wide_scheduler(*[1] * 8)
    slow = scheduler.plan(share=2)
    fast = scheduler.plan(share=2)
    finish(scheduler, fast)
    finish(scheduler, slow)
    after = scheduler.plan(share=2)
    assert {scheduled.sequence for scheduled in after.scheduled} == {
        scheduled.sequence for scheduled in fast.scheduled
    }


def test_what_is_aborted_in_flight_keeps_its_memory_until_its_step_is_done():
    scheduler = wide_scheduler(*[1] * 8)
    plan = scheduler.plan(share=2)
    gone = plan.scheduled[0].sequence
    before = scheduler.kv_allocator.num_used
    scheduler.abort(gone)
    assert scheduler.kv_allocator.num_used == before
    news = finish(scheduler, plan)
    assert gone not in [sequence for sequence, _ in news]
    assert len(news) == 3
    assert scheduler.kv_allocator.num_used < before
    assert gone not in scheduler.running


def test_few_streams_and_one_prompt_are_computed_by_all_threads_together():
    assert not wide_scheduler(*[1] * (MIN_SEQUENCES_TO_SPLIT - 2), 300).can_split()
    assert wide_scheduler(*[1] * (MIN_SEQUENCES_TO_SPLIT - 1), 300).can_split()
    assert wide_scheduler(1, 300, 300).can_split()


@pytest.mark.parametrize(("num_image_tokens", "first"), [(0, 100), (40, 80), (240, 50)])
def test_a_step_that_encodes_an_image_computes_fewer_tokens_of_its_prompt(num_image_tokens, first):
    scheduler = wide_scheduler(image_cost=0.5)
    sequence = make_sequence(length=250)
    sequence.inputs, sequence.num_image_tokens = {}, num_image_tokens
    scheduler.add(sequence)
    sizes = []
    while sequence.num_pending > 1:
        plan = scheduler.plan()
        sizes.append(plan.scheduled[0].num_tokens)
        finish(scheduler, plan)
    assert sizes == [first, 100, 150 - first]


@pytest.mark.parametrize("prefill_tokens", [7, 64, 4096])
def test_sixteen_requests_at_once_some_cancelled_give_the_answers_of_generate(
    generate, prefill_tokens
):
    prompts = mixed_prompts(16)
    expected = [generate(each) for each in prompts]

    async def main():
        engine = load(prefill_tokens=prefill_tokens, max_batch_size=9)
        answers = await ask_late(engine, prompts)
        for i, (got, want) in enumerate(zip(answers, expected, strict=True)):
            assert want.startswith(got) if i % 5 == 2 else got == want
        await engine.check()
        stats = engine.stats()
        assert stats["num_running"] == stats["num_waiting"] == stats["cache_tokens_used"] == 0
        await engine.close()

    asyncio.run(main())


def test_a_full_cache_makes_requests_wait_and_all_finish(generate):
    prompts = mixed_prompts(12)
    biggest = max(300, *(len(p.text) + 16 * len(p.images) + 40 for p in prompts))

    async def main():
        engine = load(cache_tokens=min(512, biggest))
        answers = await asyncio.gather(*[answer(engine, each) for each in prompts])
        assert answers == [generate(each) for each in prompts]
        assert engine.stats()["cache_tokens_used"] == 0
        await engine.close()

    asyncio.run(main())


def last_logits(core) -> torch.Tensor:
    inputs = core.encode("USER: <image> hello ASSISTANT:", [make_image()])
    inputs["pixel_values"] = inputs["pixel_values"].to(core.model.dtype)
    with torch.inference_mode():
        return core.model(**inputs).logits[0, -1].float()


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float32", 1e-5)])
def test_packed_weights_compute_the_same_logits(dtype, tolerance):
    core = load_model(tiny_model(), dtype=dtype, device="cpu")
    for weight in core.model.parameters():  # as from a checkpoint in 16 bits
        weight.data = weight.data.half().to(weight.dtype)
    before = last_logits(core)
    pack_linears(core.model)
    assert any(isinstance(module, PackedLinear) for module in core.model.modules())
    assert (before - last_logits(core)).abs().max() < tolerance * before.abs().max()


@pytest.mark.parametrize(("read", "num_computed"), [(-2, 1), (-1, 2), (0, 0), ([0, 1], 1)])
def test_layers_of_the_tower_that_are_not_read_are_not_computed(read, num_computed):
    core = load_model(tiny_model(), dtype="float32", device="cpu")
    core.model.config.vision_feature_layer = read
    layers = core.model.model.vision_tower.encoder.layers
    computed = []
    for layer in layers:
        layer.mlp.register_forward_hook(lambda *_, layer=layer: computed.append(layer))
    read_layer = read if isinstance(read, int) else max(read)
    pixels = core.encode("<image>", [make_image()])["pixel_values"]

    def look():
        output = core.model.model.vision_tower(pixels, output_hidden_states=True)
        return output.hidden_states[read_layer]

    before = look()
    assert len(computed) == len(layers) == 2
    computed.clear()
    skip_unused_vision_layers(core.model.model)
    assert torch.equal(look(), before)
    assert computed == list(layers[:num_computed])


def test_weights_that_need_32_bits_keep_them():
    linear = torch.nn.Sequential(torch.nn.Linear(64, 64))
    pack_linears(linear)
    assert not isinstance(linear[0], PackedLinear)


def test_replicas_that_share_a_machine_do_not_each_take_all_its_cores():
    torch.set_num_threads(1)
    engine = TorchEngine.load(ModelConfig(path=str(tiny_model()), max_replicas=4, num_cpus=3))
    assert torch.get_num_threads() == 3
    asyncio.run(engine.close())
    torch.set_num_threads(1)


def test_threads_that_compute_are_not_cut_off_by_what_wakes_up():
    async def main():
        engine = load()
        await answer(engine, prompt())
        threads = [thread for thread in threading.enumerate() if thread.name == "torch-engine"]
        policies = [os.sched_getscheduler(thread.native_id) for thread in threads]
        await engine.close()
        return policies

    with ThreadPoolExecutor(1, initializer=give_way) as helper:  # as all does that Ray starts
        policies = helper.submit(asyncio.run, main()).result()
        assert helper.submit(os.sched_getscheduler, 0).result() == os.SCHED_BATCH
    assert policies == [os.SCHED_OTHER]


# ---- beginnings that prompts share ----


FIRST = "USER: <image> what is this thing here? ASSISTANT:"
SECOND = f"{FIRST} a dog. USER: and what else is there to be seen? ASSISTANT:"


def test_the_next_turn_of_a_conversation_computes_only_what_is_new(generate):
    async def main():
        engine = load()

        async def count_cached(text: str, image) -> tuple[int, int]:
            each = prompt(text, image, max_tokens=8)
            chunks = await read(engine, each)
            assert "".join(chunk.text for chunk in chunks) == generate(each)
            return chunks[-1].num_cached_tokens, chunks[-1].num_prompt_tokens

        num_cached, num_first = await count_cached(FIRST, make_image())
        assert num_cached == 0
        num_cached, num_second = await count_cached(SECOND, make_image())
        assert num_first - 2 <= num_cached < num_second
        assert (await count_cached(SECOND, make_image()))[0] == num_second - 1
        assert (await count_cached(SECOND, make_image(1)))[0] == 0
        assert engine.stats()["cache_tokens_used"] == 0
        await engine.close()

    asyncio.run(main())


def test_questions_about_one_image_that_come_together_compute_it_once(generate):
    prompts = [prompt(f"{FIRST[:-11]} {'x' * i} ASSISTANT:", make_image()) for i in range(8)]

    async def main():
        engine = load(prefill_tokens=16)
        answers = await asyncio.gather(*[answer(engine, each) for each in prompts])
        assert answers == [generate(each) for each in prompts]
        stats = engine.stats()
        assert stats["num_cached_tokens"] > 2 * stats["num_prompt_tokens"]
        await engine.close()

    asyncio.run(main())


def test_images_are_counted_as_encoded_or_as_found_in_the_cache():
    told: list[tuple[int, int, float]] = []

    async def main():
        engine = load(note_images=lambda *figures: told.append(figures))
        await answer(engine, prompt(FIRST, make_image()))
        await answer(engine, prompt("no image here"))
        await answer(engine, prompt(SECOND, make_image()))
        two = "USER: <image> and <image> ASSISTANT:"
        await answer(engine, prompt(two, make_image(1), make_image(2)))
        await answer(engine, prompt(two, make_image(1), make_image(3)))  # one of them is known
        await answer(engine, prompt(two, make_image(1), make_image(2)))
        await engine.close()

    started = time.perf_counter()
    asyncio.run(main())
    assert [counts for *counts, _ in told] == [[1, 0], [0, 1], [2, 0], [1, 1], [0, 2]]
    assert min(seconds for num_encoded, _, seconds in told if num_encoded) > 0
    assert sum(seconds for *_, seconds in told) < time.perf_counter() - started


def test_an_image_that_is_known_is_encoded_no_more_wherever_it_stands(generate):
    told: list[tuple[int, ...]] = []
    prompts = [
        prompt(FIRST, make_image(1)),
        prompt("USER: first <image> and then <image> ASSISTANT:", make_image(2), make_image(1)),
        prompt("USER: the other way, <image> and <image> ASSISTANT:", make_image(1), make_image(2)),
    ]

    async def main(**options):
        told.clear()
        engine = load(note_images=lambda *figures: told.append(figures[:2]), **options)
        answers = [await answer(engine, each) for each in prompts]
        assert answers == [generate(each) for each in prompts]
        await engine.close()

    asyncio.run(main())
    assert told == [(1, 0), (1, 1), (0, 2)]
    asyncio.run(main(image_cache_mb=0))
    assert told == [(1, 0), (2, 0), (2, 0)]


def test_images_are_kept_until_others_need_the_memory_the_longest_unused_go_first():
    encoded: list[float] = []

    def encode(_, inputs):
        encoded.extend(inputs["pixel_values"][:, 0, 0, 0].tolist())
        return [torch.full((4, 8), value) for value in inputs["pixel_values"][:, 0, 0, 0]]

    images = EncoderCache(encode, max_bytes=2 * 4 * 8 * 4)  # two of them

    def read(*names: int) -> list[float]:
        pixels = torch.tensor(names, dtype=torch.float32)[:, None, None, None]
        sequence = Sequence("a", [1], 0, Sampling(), 1, Detokenizer(lambda ids: ""))
        sequence.inputs, sequence.image_names = {"pixel_values": pixels}, names
        encoded.clear()
        images.read([sequence])
        assert sequence.inputs[::4, 0].tolist() == list(names)
        return list(encoded)

    assert read(1, 2) == [1, 2]
    assert read(2, 1, 1) == []
    assert read(3) == [3]
    assert read(1) == []
    assert read(2) == [2]
    assert read(1, 2) == []


def test_a_stopwatch_measures_what_lies_between_its_start_and_stop():
    watch = Stopwatch(torch.device("cpu"))
    time.sleep(0.02)
    watch.stop()
    measured = watch.read()
    time.sleep(0.02)
    assert 0.02 <= measured == watch.read()


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_shared_beginnings_never_change_an_answer(generate, prefix_cache):
    rng = random.Random(3)
    prompts = []
    for _ in range(40):
        images = [make_image(rng.randrange(3)) for _ in range(rng.randrange(3))]
        text = f"USER: {'see <image> ' * len(images)}{SECOND[14 : rng.randrange(20, len(SECOND))]}"
        prompts.append(prompt(text, *images, max_tokens=rng.randint(2, 12)))
    is_read_whole = [rng.random() < 0.7 for _ in prompts]
    expected = [generate(each) for each in prompts]

    async def main():
        engine = load(
            cache_tokens=640, max_batch_size=6, prefill_tokens=24, prefix_cache=prefix_cache
        )

        async def ask(i: int) -> str:
            for _ in range(i % 7):
                await engine.check()
            if is_read_whole[i]:
                return await answer(engine, prompts[i])
            return await read_some(engine, prompts[i], 1)

        answers = await asyncio.gather(*[ask(i) for i in range(len(prompts))])
        for got, want, is_whole in zip(answers, expected, is_read_whole, strict=True):
            assert got == want if is_whole else want.startswith(got)
        assert (engine.stats()["num_cached_tokens"] > 0) == prefix_cache
        await engine.check()
        assert engine.stats()["cache_tokens_used"] == 0
        await engine.close()

    asyncio.run(main())


# ---- how answers end ----


def test_chunks_count_tokens_and_the_last_alone_says_why_it_ended():
    async def main():
        engine = load()
        chunks = await read(engine, prompt("a <image>", make_image(), max_tokens=9))
        assert [chunk.num_tokens for chunk in chunks] == list(range(1, 10))
        assert [chunk.finish_reason for chunk in chunks] == [None] * 8 + ["length"]
        assert {(c.num_prompt_tokens, c.num_image_tokens) for c in chunks} == {(19, 16)}
        await engine.close()

    asyncio.run(main())


def test_end_of_sequence_ends_the_answer_unless_it_is_ignored():
    core = load_model(tiny_model(), dtype="float32", device="cpu")
    inputs = core.encode("hello")
    eighth = int(core.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, -1])

    async def main():
        engine = load()
        engine._core = engine._core.__class__(
            **{**vars(engine._core), "eos_token_ids": frozenset([eighth])}
        )
        ends = (await read(engine, prompt(max_tokens=30)))[-1]
        goes_on = (await read(engine, prompt(max_tokens=30, ignore_eos=True)))[-1]
        assert ends.finish_reason == "stop"
        assert ends.num_tokens <= 8
        assert (goes_on.finish_reason, goes_on.num_tokens) == ("length", 30)
        await engine.close()

    asyncio.run(main())


def test_a_stop_text_ends_the_answer_before_it_and_no_part_of_it_is_shown(generate):
    whole = generate(prompt(max_tokens=40))
    stop = whole[11:16]
    expected = whole[: whole.index(stop)]

    async def main():
        engine = load()
        chunks = await read(engine, prompt(max_tokens=40, stop=("never said", stop)))
        assert "".join(chunk.text for chunk in chunks) == expected
        assert chunks[-1].finish_reason == "stop"
        shown = list(itertools.accumulate(chunk.text for chunk in chunks))
        assert all(expected.startswith(text) for text in shown)
        await engine.close()

    asyncio.run(main())


def test_without_max_tokens_the_answer_fills_the_context():
    async def main():
        engine = load(context_length=40)
        last = (await read(engine, prompt("abc", max_tokens=None, ignore_eos=True)))[-1]
        assert last.num_prompt_tokens + last.num_tokens == 40
        assert last.finish_reason == "length"
        await engine.close()

    asyncio.run(main())


def test_text_streams_never_show_half_a_character():
    tokenizer = build_byte_tokenizer(context_length=64)
    text = "naïve 狗🐶 done"
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = Detokenizer(lambda ids: tokenizer.decode(ids))
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > len(text)


def test_text_streams_hold_back_what_may_become_a_stop_text():
    words = ["ab", "c#", "#", "x", "##", "#", "y"]
    stream = Detokenizer(lambda ids: "".join(words[i] for i in ids), stop=["###"])
    shown = [stream.push(i) for i in range(6)]
    assert shown == ["ab", "c", "", "##x", "", ""]
    assert stream.is_stopped
    stream = Detokenizer(lambda ids: "".join(words[i] for i in ids), stop=["###"])
    assert stream.push(1) == "c"
    assert stream.flush() == "#"


# ---- sampling ----


def test_a_seed_makes_the_answer_repeatable_whatever_runs_beside_it():
    async def main():
        engine = load()
        seeded = prompt("a <image>", make_image(), temperature=1.0, top_p=0.9, seed=3)
        alone = await answer(engine, seeded)
        others = [prompt("x" * i, temperature=1.5, seed=i) for i in range(1, 6)]
        beside, *_ = await asyncio.gather(*[answer(engine, each) for each in [seeded, *others]])
        other_seed = await answer(
            engine, prompt("a <image>", make_image(), temperature=1.0, seed=4)
        )
        assert alone == beside != other_seed
        await engine.close()

    asyncio.run(main())


def test_top_p_draws_from_the_nucleus_in_proportion():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def draw(**sampling) -> list[float]:
        sequences = [make_sequence(Sampling(seed=i, **sampling)) for i in range(4000)]
        tokens = sample(logits.expand(4000, 4), sequences).tokens_B
        return [round(float((tokens == i).float().mean()), 1) for i in range(4)]

    assert draw() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.06)
    assert draw(top_p=0.7) == [0.6, 0.4, 0, 0]
    assert draw(top_p=0.01) == [1, 0, 0, 0]
    assert draw(temperature=0.05) == [1, 0, 0, 0]


# ---- refusals ----


def test_a_prompt_that_does_not_fit_is_refused_with_its_sizes():
    async def main():
        engine = load()
        with pytest.raises(ContextLengthError) as too_long:
            await answer(engine, prompt("<image>" * 2 + "A" * 600, make_image(), make_image(1)))
        assert str(too_long.value).startswith("the prompt has 633 tokens (32 for 2 images, 601 ")
        with pytest.raises(ContextLengthError, match="ask for at most 510") as too_much:
            await answer(engine, prompt("ab", max_tokens=600))
        assert too_much.value.param == "max_tokens"
        cut = (await read(engine, prompt("ab", max_tokens=600, ignore_eos=True, may_cut=True)))[-1]
        assert (cut.num_tokens, cut.finish_reason) == (510, "length")
        with pytest.raises(RequestError, match="names 1 images and 0 came"):
            await answer(engine, prompt("<image>"))
        assert await answer(engine, prompt())
        await engine.close()

    asyncio.run(main())


def test_a_context_that_the_model_was_not_made_for_is_refused():
    with pytest.raises(ConfigError, match="context_length=9999 is more than the 512"):
        load_engine(ModelConfig(path=str(tiny_model()), context_length=9999))


# ---- cancellation ----


def test_leaving_a_stream_frees_its_cache_within_a_step():
    async def main():
        engine = load()
        endless = prompt("a <image>", make_image(), max_tokens=None, ignore_eos=True)
        tasks = [asyncio.create_task(answer(engine, endless)) for _ in range(3)]
        await read_some(engine, endless, 5)
        await engine.check()
        assert engine.stats()["num_running"] == 3
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        before = engine.stats()["num_steps"]
        await engine.check()
        stats = engine.stats()
        assert stats["num_running"] == stats["cache_tokens_used"] == 0
        assert stats["num_steps"] - before <= 2
        await engine.close()

    asyncio.run(main())


# ---- the scheduler and the loop, with a runner that computes nothing ----


def _run(scheduler: Scheduler, runner: ScriptedRunner) -> list[str]:
    """Run to the end; return the answers in the order in which they end."""
    texts: dict[Sequence, str] = {}
    while scheduler.has_work():
        plan = scheduler.plan()
        assert plan.scheduled, "a step without work never ends"
        tokens = runner.run(plan)
        scheduler.advance(plan)
        for sequence, chunk in scheduler.commit(plan, tokens):
            texts[sequence] = texts.pop(sequence, "") + chunk.text
    return list(texts.values())


def test_long_prompts_are_computed_in_parts_beside_running_answers():
    scheduler = Scheduler(cache_tokens=100, max_batch_size=4, prefill_tokens=10)
    runner = ScriptedRunner()
    scheduler.add(make_sequence(length=2, max_tokens=8))
    scheduler.add(make_sequence(length=25, max_tokens=2))
    assert _run(scheduler, runner) == ["7 8 ", "7 8 9 10 11 12 13 14 "]
    sizes = [[scheduled.num_tokens for scheduled in plan.scheduled] for plan in runner.plans[:5]]
    assert sizes == [[2, 8], [1, 10], [1, 7], [1, 1], [1]]


def test_any_mix_of_requests_ends_in_a_small_cache_without_overlap():
    rng = random.Random(1)
    scheduler = Scheduler(cache_tokens=640, max_batch_size=5, prefill_tokens=99)
    runner = ScriptedRunner()
    sequences = [
        make_sequence(length=rng.randint(1, 500), max_tokens=rng.randint(1, 140))
        for _ in range(300)
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    steps = 0
    while scheduler.has_work():
        plan = scheduler.plan()
        owned = sorted(s.kv_slice for s in scheduler.running)
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(owned))
        assert len(scheduler.running) <= 5
        scheduler.advance(plan)
        scheduler.commit(plan, runner.run(plan))
        if rng.random() < 0.1:
            scheduler.abort(rng.choice(sequences))
        steps += 1
    assert scheduler.kv_allocator.num_used == scheduler.prefix_cache.num_tokens
    assert scheduler.prefix_cache.reserve(640) == (0, 640)


def test_slices_are_joined_again_when_they_are_released():
    allocator = KVAllocator(10)
    taken = [allocator.reserve(n) for n in (3, 4, 3)]
    assert taken == [(0, 3), (3, 4), (7, 3)]
    allocator.release(taken[0])
    allocator.release(taken[2])
    assert allocator.reserve(4) is None
    allocator.release(taken[1])
    assert (allocator.reserve(10), allocator.num_used) == ((0, 10), 10)


def test_slices_of_similar_requests_have_equal_lengths():
    allocator = KVAllocator(100, granule=32)
    assert allocator.num_tokens == 128
    assert [allocator.reserve(n) for n in (30, 32, 33)] == [(0, 32), (32, 32), (64, 64)]
    assert allocator.reserve(1) is None


def test_lanes_are_rows_of_equal_distance_and_similar_length():
    def starts(*spans: tuple[int, int, int]) -> list[list[int]]:
        groups = group_by_stride([Span(0, 1, KVSlice(a, n), past) for a, n, past in spans])
        return [[span.kv_slice.start for span in group] for group in groups]

    assert starts((40, 20, 9), (0, 20, 9), (20, 20, 9)) == [[0, 20, 40]]
    assert starts((0, 20, 9), (20, 20, 9), (50, 20, 9), (70, 20, 9)) == [[0, 20], [50, 70]]
    assert starts((0, 60, 50), (60, 60, 1)) == [[0], [60]]
    assert starts((0, 20, 9), (20, 60, 9)) == [[0], [20]]


def test_a_broken_runner_fails_every_stream_and_the_check(caplog):
    async def main():
        runner = ScriptedRunner()
        runner.breaks_at = 4
        engine = load(runner=runner)
        with caplog.at_level(logging.CRITICAL, logger="llava_ray.engine.torch_engine.engine_loop"):
            results = await asyncio.gather(
                *[answer(engine, prompt("abc", max_tokens=9)) for _ in range(3)],
                return_exceptions=True,
            )
        assert [str(error) for error in results] == [
            "the engine broke: RuntimeError: out of luck"
        ] * 3
        assert {type(error) for error in results} == {EngineError}
        with pytest.raises(EngineError, match="out of luck"):
            await engine.check()
        with pytest.raises(EngineError, match="out of luck"):
            await answer(engine, prompt())
        await engine.close()

    asyncio.run(main())


def test_the_check_asks_the_runner_and_notices_a_step_that_hangs(caplog):
    async def main():
        runner = ScriptedRunner()
        engine = load(runner=runner, patience_s=0.05)
        await engine.check()
        runner.delay_s = 0.5
        task = asyncio.create_task(answer(engine, prompt("abc", max_tokens=1)))
        while not runner.plans:
            await asyncio.sleep(0.001)
        with pytest.raises(EngineError, match="stuck in one step"):
            await engine.check()
        await task
        runner.breaks_at = 0
        with (
            caplog.at_level(logging.CRITICAL, logger="llava_ray.engine.torch_engine.engine_loop"),
            pytest.raises(EngineError, match="check failed: out of luck"),
        ):
            await engine.check()
        await engine.close()

    asyncio.run(main())


def test_closing_fails_what_is_running():
    async def main():
        engine = load()
        task = asyncio.create_task(answer(engine, prompt(max_tokens=None, ignore_eos=True)))
        while not engine.stats()["num_running"]:
            await asyncio.sleep(0.001)
        await engine.close()
        with pytest.raises(EngineError, match="was closed"):
            await task
        with pytest.raises(EngineError, match="was closed"):
            await engine.check()

    asyncio.run(main())


def test_the_runner_checks_itself_without_touching_the_cache_of_others():
    core = load_model(tiny_model(), dtype="float32", device="cpu")
    runner = ModelRunner(core, cache_tokens=8)
    others = 8 * runner._cache.num_kv_heads
    for pool in runner._cache.keys:
        pool[:others] = 3
    runner.check()
    assert all(bool((pool[:others] == 3).all()) for pool in runner._cache.keys)


# ---- the fake that ships ----


def test_echo_says_the_last_words_back_and_counts_images():
    async def main():
        engine = EchoEngine()
        said = prompt(
            "USER: one ASSISTANT: two</s>USER: <image>\nwhat is it? ASSISTANT:", make_image()
        )
        chunks = await read(engine, said)
        assert "".join(chunk.text for chunk in chunks) == "what is it? (1 images)"
        assert chunks[-1].finish_reason == "stop"
        assert (await read(engine, prompt("a b c", max_tokens=2)))[-1].finish_reason == "length"
        assert await answer(engine, prompt("a b c", stop=("c",))) == "a b "
        last = (await read(engine, prompt("a b", max_tokens=50, ignore_eos=True)))[-1]
        assert (last.num_tokens, last.finish_reason) == (50, "length")
        with pytest.raises(ContextLengthError):
            await answer(engine, prompt("a " * 5000))
        assert engine.stats()["num_running"] == 0
        await engine.close()
        with pytest.raises(EngineError):
            await engine.check()

    asyncio.run(main())


def test_an_engine_says_how_it_computes():
    engine = load(cache_tokens=1000, max_batch_size=3)
    assert engine.describe() == {
        "engine": "torch",
        "device": "cpu",
        "dtype": "float32",
        "attention": "own kernels",
        "graphs": "off: not used on a CPU",
        "cache dtype": "float32",
        "cache": "1024 tokens",
        "batch": "3 sequences",
    }
    asyncio.run(engine.close())
