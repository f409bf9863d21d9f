"""A step that fails costs one request; want of memory costs no more, however often it comes."""

import pytest

from perseid_server.engine.attempts import FEW_ROWS, MOST_FAILED_STEPS, MOST_STARVED_STEPS, is_out_of_memory
from tests.fakes import FakeRunner, expected, fake_engine
from tests.server.engine.test_engine import prompt_of, request, run, tokens


class OutOfMemoryError(RuntimeError):
    """As torch's for CUDA."""


def test_a_broken_step_costs_the_newest_request_only():
    runner = FakeRunner(64, fail_on={"heavy"})
    engine = fake_engine(runner=runner)
    engine.submit(request("old", prompt_of(5)))
    engine.step()
    engine.submit(request("heavy", prompt_of(5, 1)))
    outputs = run(engine)
    assert "ran out of memory" in outputs["heavy"][-1].error
    assert len(tokens(outputs["old"])) == 5
    assert engine.stats().kv_blocks_used == 0


def test_steps_that_fail_one_after_the_other_end_the_engine():
    """A broken device must not eat a request a step for ever."""
    names = [f"r{i}" for i in range(MOST_FAILED_STEPS + 4)]
    engine = fake_engine(runner=FakeRunner(64, fail_on=set(names)))
    for i, name in enumerate(names):
        engine.submit(request(name, prompt_of(4, i), 2))
    for _ in range(MOST_FAILED_STEPS - 1):
        engine.step()
    with pytest.raises(MemoryError):
        engine.step()


def test_failed_steps_with_good_ones_between_do_not_end_the_engine():
    names = [f"r{i}" for i in range(2 * MOST_FAILED_STEPS)]
    engine = fake_engine(runner=FakeRunner(64, fail_on=set(names)))
    for i, name in enumerate(names):
        engine.submit(request(name, prompt_of(4, i), 2))
        outputs = run(engine)
        assert outputs[name][-1].finish_reason == "error"
        engine.submit(request(f"good{i}", prompt_of(3, i), 1))
        assert run(engine)[f"good{i}"][-1].finish_reason == "length"


def huge_prompts(error: Exception, count: int):
    """An engine that has no memory for steps of more rows than FEW_ROWS, and requests that need such."""

    class Small(FakeRunner):
        def run(self, step):
            if step.num_rows > FEW_ROWS:
                raise type(error)(*error.args)
            return super().run(step)

    engine = fake_engine(num_blocks=4096, max_batch_tokens=4 * FEW_ROWS, runner=Small(4096))
    for number in range(count):
        engine.submit(request(f"huge{number}", prompt_of(2 * FEW_ROWS, number), 2))
    return engine


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_prompts_too_large_for_memory_are_given_up_one_by_one_and_who_runs_goes_on(error: Exception):
    count = MOST_FAILED_STEPS + 4
    assert 2 * count < MOST_STARVED_STEPS
    engine = huge_prompts(error, 0)
    engine.submit(request("old", prompt_of(5), 20))
    engine.step()
    for number in range(count):
        engine.submit(request(f"huge{number}", prompt_of(2 * FEW_ROWS, number), 2))
    outputs = run(engine)
    for number in range(count):
        assert "ran out of memory" in outputs[f"huge{number}"][-1].error
        assert outputs[f"huge{number}"][-1].error_kind == "unavailable"
    assert tokens(outputs["old"]) == expected(prompt_of(5), None, 20)[1:]
    assert engine.stats().kv_blocks_used == 0
    for number in range(count):  # nobody runs beside them
        engine.submit(request(f"again{number}", prompt_of(2 * FEW_ROWS, number), 2))
    assert len(run(engine)) == count
    engine.submit(request("after", prompt_of(6), 3))
    assert tokens(run(engine)["after"]) == expected(prompt_of(6), None, 3)


def test_memory_that_does_not_come_back_ends_the_engine():
    engine = huge_prompts(MemoryError(), MOST_STARVED_STEPS - 1)
    run(engine)
    engine.submit(request("small", prompt_of(5), 3))
    assert len(tokens(run(engine)["small"])) == 3, "which says nothing of large ones"
    engine.submit(request("last", prompt_of(2 * FEW_ROWS, 99), 2))
    with pytest.raises(MemoryError):
        run(engine)


def test_large_steps_that_go_well_between_do_not():
    runner = FakeRunner(4096, fail_on={f"bad{number}" for number in range(2 * MOST_STARVED_STEPS)})
    engine = fake_engine(num_blocks=4096, max_batch_tokens=4 * FEW_ROWS, runner=runner)
    for number in range(2 * MOST_STARVED_STEPS):
        for name in (f"bad{number}", f"good{number}"):
            engine.submit(request(name, prompt_of(2 * FEW_ROWS, number), 2))
            outputs = run(engine)
        assert outputs[f"good{number}"][-1].finish_reason == "length"


def test_a_step_that_breaks_is_no_lack_of_anything():
    engine = huge_prompts(RuntimeError("an illegal memory access was encountered"), 1)
    told = run(engine)["huge0"][-1]
    assert (told.error, told.error_kind) == ("the step failed: RuntimeError", "failed")


def test_large_steps_that_fail_for_another_reason_end_the_engine():
    engine = huge_prompts(RuntimeError("an illegal memory access was encountered"), MOST_FAILED_STEPS)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(engine)


def test_what_tells_of_memory():
    assert not is_out_of_memory(RuntimeError("memory access"))
    assert is_out_of_memory(OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))
