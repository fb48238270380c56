"""The engine's life, on a stand-in for vLLM: made once, asleep only between rest and the next use, awake at the end."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tqdm import tqdm

from tip_exp.config.schema import RunConfig
from tip_exp.models.pair import Pair
from tip_exp.rollout import vllm
from tip_exp.rollout.vllm import EngineError, VllmSampler, config_folder, request_seed
from tip_exp.types import Sampling

MakeSampler = Callable[..., VllmSampler]
TWO = Sampling(2, 1.0, 1.0, 0, 5)


class FakeLLM:
    """Records calls; answers every request with the token 7."""

    calls: ClassVar[list[str]] = []
    params: ClassVar[list[Any]] = []
    fails = ""

    def __init__(self, **options: Any) -> None:
        self._record("start")

    def _record(self, call: str) -> None:
        self.calls.append(call)
        if self.fails and call.startswith(self.fails):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    def generate(self, requests: list[Any], params: list[Any], use_tqdm: Any) -> list[Any]:
        self._record("generate")
        if use_tqdm:
            bar = use_tqdm(total=len(requests))
            len(requests) / bar.format_dict["elapsed"]  # as vLLM computes its rate
            bar.close()
        self.params.extend(params)
        logprobs = SimpleNamespace(logprobs=[-0.5])
        output = SimpleNamespace(token_ids=[7], logprobs=logprobs, finish_reason="stop")
        return [SimpleNamespace(outputs=[output]) for _ in requests]

    def sleep(self, level: int) -> None:
        self._record(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        assert self.calls.pop() == "empty cache", "torch returns its cached memory to the device first"
        self._record(f"wake {' '.join(tags)}")

    def collective_rpc(self, name: str, args: tuple[Any, ...]) -> None:
        self._record("load")

    def reset_prefix_cache(self) -> bool:
        return True


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, SimpleNamespace
    module.envs = SimpleNamespace(VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm, "_engine", None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: FakeLLM.calls.append("empty cache"))
    monkeypatch.setattr(FakeLLM, "calls", [])
    monkeypatch.setattr(FakeLLM, "params", [])
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    return FakeLLM.calls


@pytest.fixture
def make(calls: list[str], tiny_pair: Pair, tiny_config: RunConfig) -> MakeSampler:
    """make(2) -> a sampler on a GPU whose engine sleeps at level 2."""

    def sampler(level: int = 1) -> VllmSampler:
        made = VllmSampler(
            tiny_pair.student.module,
            stop_ids=[2],
            settings=tiny_config.rollout.vllm,
            dtype="float32",
            max_model_len=100,
            max_num_seqs=4,
        )
        assert made.sleep_level == 0  # on a CPU vLLM cannot sleep
        made.sleep_level = level
        return made

    return sampler


def of(calls: list[str]) -> list[str]:
    """The calls since the last look."""
    recent = calls.copy()
    calls.clear()
    return recent


def test_the_engine_sleeps_while_the_learner_works_and_at_no_other_time(make: MakeSampler, calls: list[str]) -> None:
    sampler = make()
    assert of(calls) == ["start", "load"]
    for _ in range(2):  # the turns of tool episodes share the prefix cache
        sampler.generate([[1]], TWO, seed=0)
    assert of(calls) == ["generate", "generate"]
    sampler.rest()
    sampler.rest()
    assert of(calls) == ["sleep 1"]
    sampler.sync()  # without the KV cache, which the learner's memory may still need
    assert of(calls) == ["wake weights", "load"]
    sampler.generate([[1]], TWO, seed=0)
    assert of(calls) == ["wake kv_cache", "generate"]
    sampler.rest()
    sampler.generate([[1]], TWO, seed=0)  # an evaluation after its divergences were measured
    assert of(calls) == ["sleep 1", "wake weights", "wake kv_cache", "generate"]


def test_weights_that_sleep_level_2_drops_are_loaded_again(make: MakeSampler, calls: list[str]) -> None:
    sampler = make(2)
    sampler.rest()
    of(calls)
    sampler.generate([[1]], TWO, seed=0)
    assert of(calls) == ["wake weights", "load", "wake kv_cache", "generate"]


def test_a_sampler_that_does_not_sleep_ignores_rest(make: MakeSampler, calls: list[str]) -> None:
    sampler = make(0)
    of(calls)
    sampler.rest()
    sampler.close()
    assert of(calls) == []


def test_the_end_of_a_run_wakes_the_engine_and_does_not_shut_it_down(
    make: MakeSampler, calls: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory that sleeps is unmapped; vLLM unmaps it once more at exit."""
    sampler = make()
    sampler.close()
    assert of(calls) == ["start", "load"] and vllm._engine is sampler._llm
    sampler.rest()
    sampler.close()
    assert of(calls) == ["sleep 1", "wake kv_cache", "wake weights"]
    sampler.rest()
    monkeypatch.setattr(FakeLLM, "fails", "wake")
    sampler.close()  # the learner may have failed for want of memory
    assert "did not wake up at the end: CUDA out of memory" in caplog.text


def test_a_process_has_one_engine(make: MakeSampler, calls: list[str]) -> None:
    make().close()
    with pytest.raises(EngineError, match="already has a vLLM engine; start each run in a process of its own"):
        make()
    assert of(calls) == ["start", "load"]


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("start", r"^the vLLM engine did not start: CUDA out of memory\. Tried to allocate 2 GiB$"),
        (
            "load",
            r"failed while taking the learner's weights \(CUDA out of memory[^\n]*\); the same command goes on from",
        ),
        ("generate", r"failed while sampling \(CUDA out of memory[^\n]*\).* lower rollout\.batch_size or"),
        ("sleep", r"failed while going to sleep"),
    ],
)
def test_a_failed_engine_is_one_message_with_the_remedy(
    make: MakeSampler, monkeypatch: pytest.MonkeyPatch, fails: str, message: str
) -> None:
    monkeypatch.setattr(FakeLLM, "fails", fails)

    def use() -> None:
        sampler = make()
        sampler.generate([[1]], TWO, seed=0)
        sampler.rest()

    with pytest.raises(EngineError, match=message):
        use()


def test_requests_have_the_seeds_of_their_prompts_and_limits_of_their_own(make: MakeSampler) -> None:
    sampler = make()
    sampler.generate([[1], [3]], Sampling(2, 1.0, 1.0, 0, 5, limits=(5, 2)), seed=9, indices=[4, 6])
    assert [params.seed for params in FakeLLM.params] == [request_seed(9, p, s) for p in (4, 6) for s in (0, 1)]
    assert [params.max_tokens for params in FakeLLM.params] == [5, 5, 2, 2]
    FakeLLM.params.clear()
    sampler.generate([[1], [3]], TWO, seed=9)
    assert [params.seed for params in FakeLLM.params] == [request_seed(9, p, s) for p in (0, 1) for s in (0, 1)]
    assert {params.max_tokens for params in FakeLLM.params} == {5}


def test_equal_models_start_from_one_folder(tmp_path: Path, tiny_pair: Pair) -> None:
    """vLLM compiles again for every path of a model."""
    student, teacher = tiny_pair.student.module.config, tiny_pair.teacher.module.config
    folders = [config_folder(config, tmp_path / "new") for config in (student, student, teacher)]
    assert folders[0] == folders[1] != folders[2]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted({folder.name for folder in folders})
    assert [path.name for path in folders[0].iterdir()] == ["config.json"]


def test_ranks_of_one_machine_do_not_share_compiled_code(
    tmp_path: Path, tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the number of the rank's GPU."""
    folders = []
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        folders.append(config_folder(tiny_pair.student.module.config, tmp_path))
    assert folders[0] != folders[1]


def test_bars_may_be_disabled(make: MakeSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of all ranks but the first, and of the runs of a sweep: a disabled bar has counted no time."""
    sampler = make()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(vllm, "progress_bar", partial(tqdm, disable=True))
    assert len(sampler.generate([[5, 6]], TWO, seed=0)) == 2


def test_the_engine_leaves_the_threads_of_the_process(make: MakeSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(FakeLLM, "__init__", lambda self, **options: torch.set_num_threads(threads + 1))
    make()
    assert torch.get_num_threads() == threads


def test_modules_of_the_learner_are_called_by_torch(
    make: MakeSampler, tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's engine may give the class of the learner's module a call of its own, which skips hooks."""
    backbone, ids = tiny_pair.student.module.base_model, torch.tensor([[5, 6]])

    def start(self: FakeLLM, **options: Any) -> None:
        monkeypatch.setattr(type(backbone), "__call__", lambda self, *inputs: "compiled", raising=False)

    monkeypatch.setattr(FakeLLM, "__init__", start)
    make()
    hooked: list[int] = []
    with backbone.register_forward_hook(lambda *_: hooked.append(1)):
        assert backbone(ids).last_hidden_state.shape[:2] == (1, 2) and hooked
    of_engine = copy.deepcopy(backbone)
    of_engine.vllm_config = None
    assert of_engine(ids) == "compiled"
