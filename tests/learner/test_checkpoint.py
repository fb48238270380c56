"""Checkpoints survive torn files, full disks and crashes, and resume on other numbers of ranks."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.helpers import make_learner, sample_rollouts, train_step
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import tip_exp
from tip_exp.config.schema import RunConfig
from tip_exp.learner.checkpoint import CheckpointError, Checkpoints
from tip_exp.learner.distributed import Ranks
from tip_exp.learner.model_folder import export
from tip_exp.models.load import load_pair
from tip_exp.models.pair import Pair
from tip_exp.types import Rollout
from tip_exp.utils.errors import ConfigError, RunFailedError
from tip_exp.utils.termination import Terminated

ROOT, CPU = Path(__file__).parents[2], torch.device("cpu")

ROLLOUTS = [
    Rollout([5, 6, 2], [False, True, True], "stop", [-0.1, -1 / 3]),
    Rollout([5, 7], [False, True], "length", []),
]


def checkpoints_in(folder: Path) -> Checkpoints:
    return Checkpoints(folder, Ranks())


def adamw(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)


def save(checkpoints: Checkpoints, pair: Pair, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, pair.student.module, adamw(pair.student.module), "hf")


def newest_step(folder: Path) -> int | None:
    newest = checkpoints_in(folder).newest()
    return newest and newest.step


@contextmanager
def full_disk() -> Iterator[None]:
    """The kernel's file-size limit fails a write in the middle of the weights, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_resumed_learner_holds_what_was_saved_and_not_what_came_after(
    tmp_path: Path, tiny_pair: Pair, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    updated, write_data = threading.Event(), FileSystemWriter.write_data
    monkeypatch.setattr(FileSystemWriter, "write_data", lambda *args: updated.wait(60) and write_data(*args))
    learner, rollouts = make_learner(tiny_pair, tiny_config.learner), sample_rollouts(tiny_pair)
    train_step(learner, rollouts, 1)
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(1, tiny_pair.student.module, learner.optimizer, "hf")
    train_step(learner, rollouts, 2)  # before the first byte is written
    updated.set()
    checkpoints.wait()
    again = make_learner(load_pair(tiny_config.pair, CPU), tiny_config.learner)
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 1 and newest.backend == "hf"
    newest.load(again.pair.student.module, again.optimizer)
    assert all(float(state["step"]) == 1 for state in again.optimizer.state.values())
    train_step(again, rollouts, 2)
    for parameter, expected in zip(again.parameters, learner.parameters, strict=True):
        assert parameter.equal(expected)
        state, expected_state = again.optimizer.state[parameter], learner.optimizer.state[expected]
        assert state.keys() == expected_state.keys() and all(state[k].equal(expected_state[k]) for k in state)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Terminated("SIGTERM"), OSError("input/output error")])
def test_what_ends_the_reading_of_a_checkpoint_is_raised_as_it_is(
    two_saved: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch wraps it in an exception that is no Exception, and that no `except KeyboardInterrupt` catches."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(FileSystemReader, "read_data", fail)
    newest, module = checkpoints_in(two_saved).newest(), nn.Linear(64, 64)
    assert newest is not None
    with pytest.raises(type(error)) as raised:
        newest.load(module, adamw(module))
    assert raised.value is error


def test_the_newest_two_are_kept(tmp_path: Path, tiny_pair: Pair) -> None:
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, tiny_pair, 1, 2, 3)
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00002", "step_00003"]
    assert newest_step(tmp_path) == 3


def saved_steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_steps_are_numbers_and_copies_do_not_count(tmp_path: Path) -> None:
    """As text step_100000 comes before step_99999."""
    checkpoints, module = checkpoints_in(tmp_path), nn.Linear(4, 4)
    for step in (99_998, 99_999, 100_000):
        checkpoints.save(step, module, adamw(module), "hf")
        checkpoints.wait()
        if step == 99_998:
            shutil.copytree(tmp_path / "step_99998", tmp_path / "step_99998_backup")
    assert saved_steps(tmp_path) == ["step_100000", "step_99998_backup", "step_99999"]
    assert newest_step(tmp_path) == 100_000


def test_a_kill_while_pruning_leaves_nothing_that_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, module = checkpoints_in(tmp_path), nn.Linear(4, 4)
    for step in (1, 2):
        checkpoints.save(step, module, adamw(module), "hf")
    rmtree = shutil.rmtree

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if ignore_errors:
            return rmtree(path, ignore_errors=True)
        next(Path(path).iterdir()).unlink()
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        checkpoints.save(3, module, adamw(module), "hf")
        with pytest.raises(CheckpointError, match="killed"):
            checkpoints.wait()
    assert saved_steps(tmp_path) == [".removing_step_00001", "step_00002", "step_00003"]
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(4, module, adamw(module), "hf")
    checkpoints.wait()
    assert saved_steps(tmp_path) == ["step_00003", "step_00004"]


def test_later_checkpoints_than_the_one_resumed_from_are_replaced(tmp_path: Path, two_saved: Path) -> None:
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    shutil.copytree(two_saved / "step_00002", tmp_path / "step_00009")
    (tmp_path / "step_00009" / "rows.json").unlink()
    checkpoints, module = checkpoints_in(tmp_path), nn.Linear(64, 64)
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 2
    checkpoints.save(3, module, adamw(module), "hf")
    checkpoints.wait()
    assert saved_steps(tmp_path) == ["step_00002", "step_00003"]


def test_the_newest_before_a_step_is_of_an_earlier_one(two_saved: Path) -> None:
    newest = checkpoints_in(two_saved).newest(before=2)
    assert newest is not None and newest.step == 1


def test_a_checkpoint_without_its_rows_gives_way_or_is_refused(two_saved: Path) -> None:
    checkpoints = checkpoints_in(two_saved)
    newest = checkpoints.newest(lambda rows: "x.jsonl is empty" if rows["x.jsonl"][0] > 10 else "")
    assert newest is not None and newest.step == 1
    expected = r"holds whole checkpoints, but the rows before them are damaged \(step_00002: x is empty\). Restore"
    with pytest.raises(RunFailedError, match=expected):
        checkpoints.newest(lambda _: "x is empty")


@pytest.mark.parametrize("where", ["weight", "exp_avg_sq"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, where: str, value: float) -> None:
    checkpoints, module = checkpoints_in(tmp_path), nn.Linear(4, 4)
    optimizer = adamw(module)
    module(torch.ones(4)).sum().backward()
    optimizer.step()
    checkpoints.save(1, module, optimizer, "hf")
    victim = module.weight if where == "weight" else optimizer.state[module.weight][where]
    with torch.no_grad():
        victim[1, 2] = value
    with pytest.raises(FloatingPointError, match="not finite after step 2"):
        checkpoints.save(2, module, optimizer, "hf")
    checkpoints.wait()
    assert saved_steps(tmp_path) == ["step_00001"]


def test_a_process_that_lost_the_folder_publishes_no_checkpoint(tmp_path: Path) -> None:
    """The folder is moved while the background thread writes: the second call of the check fails."""
    calls: list[int] = []

    def check_held() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RunFailedError("the lock is lost")

    checkpoints, module = Checkpoints(tmp_path, Ranks(), check_held), nn.Linear(4, 4)
    checkpoints.save(1, module, adamw(module), "hf")
    with pytest.raises(CheckpointError, match="the lock is lost"):
        checkpoints.wait()
    assert saved_steps(tmp_path) == []


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, module = tmp_path_factory.mktemp("two"), nn.Linear(64, 64)
    checkpoints = checkpoints_in(folder)
    for step in (1, 2):
        checkpoints.save(step, module, adamw(module), "hf", {"x.jsonl": [10 * step, "hash"]}, ROLLOUTS)
    checkpoints.wait()
    return folder


@pytest.mark.parametrize(
    "victim", ["__0_0.distcp", ".metadata", "backend.json", "rows.json", "rollouts.json", "checksums.json"]
)
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_torn_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, two_saved: Path, victim: str, damage: str
) -> None:
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    assert newest_step(tmp_path) == 2
    path = tmp_path / "step_00002" / victim
    assert victim in {file.name for file in path.parent.iterdir()}
    if damage == "remove":
        path.unlink()
    else:
        data = path.read_bytes()
        half = len(data) // 2
        path.write_bytes(data[:half] if damage == "cut" else flipped(data))
    assert newest_step(tmp_path) == 1


def flipped(data: bytes) -> bytes:
    half = len(data) // 2
    return data[:half] + bytes([data[half] ^ 255]) + data[half + 1 :]


def test_rollouts_of_the_next_step_return_as_they_were(tmp_path: Path, two_saved: Path) -> None:
    newest = checkpoints_in(two_saved).newest()
    assert newest is not None and newest.rollouts == ROLLOUTS
    checkpoints, module = checkpoints_in(tmp_path), nn.Linear(2, 2)
    checkpoints.save(1, module, adamw(module), "hf")
    checkpoints.wait()
    newest = checkpoints.newest()
    assert newest is not None and newest.rollouts is None


def test_no_whole_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_step(tmp_path) is None
    (tmp_path / "step_00001").mkdir()
    assert newest_step(tmp_path) is None


def test_a_disk_that_takes_no_more_is_one_error_and_the_old_checkpoint_stands(tmp_path: Path, tiny_pair: Pair) -> None:
    """The error of the background is raised by the next save, or by `wait` at the end of a run."""
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, tiny_pair, 1)
    checkpoints.wait()
    with full_disk():
        save(checkpoints, tiny_pair, 2)
        with pytest.raises(CheckpointError, match=r"the checkpoint of step 2 could not be written to .*File too large"):
            save(checkpoints, tiny_pair, 3)
        checkpoints.wait()  # nothing is in flight
    assert newest_step(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_00001"]


def test_what_a_crash_left_half_written_is_overwritten(tmp_path: Path, tiny_pair: Pair) -> None:
    (tmp_path / ".writing_00001").mkdir()
    (tmp_path / ".writing_00001" / "old").write_text("half")
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, tiny_pair, 1)
    checkpoints.wait()
    assert newest_step(tmp_path) == 1 and not (tmp_path / "step_00001" / "old").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, two_saved: Path) -> None:
    newest = checkpoints_in(two_saved).newest()
    assert newest is not None
    for module in (nn.Linear(64, 65), nn.Linear(64, 64, bias=False)):
        with pytest.raises(ConfigError, match=r"weights of other names or shapes than pair.student trains"):
            newest.load(module, adamw(module))


def test_an_export_is_a_plain_model_folder_that_replaces_the_one_before(tmp_path: Path, tiny_pair: Pair) -> None:
    folder, student = tmp_path / "model", tiny_pair.student.module
    for _ in range(2):
        export(folder, student, tiny_pair.tokenizer, Ranks())
        again = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(value.equal(again[name]) for name, value in student.state_dict().items())
        with torch.no_grad():
            next(student.parameters()).add_(1)
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny_pair.tokenizer.chat_template
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    before = (folder / "model.safetensors").read_bytes()
    with full_disk(), pytest.raises(CheckpointError, match="the model could not be written to"):
        export(folder, student, tiny_pair.tokenizer, Ranks())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "model.safetensors").read_bytes() == before


def test_an_export_that_cannot_begin_says_so(tmp_path: Path, tiny_pair: Pair) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="the model could not be written to"):
        export(tmp_path / "file" / "model", tiny_pair.student.module, tiny_pair.tokenizer, Ranks())


def test_an_export_holds_persistent_buffers(tmp_path: Path, tiny_pair: Pair) -> None:
    student = tiny_pair.student.module
    student.base_model.register_buffer("bias_of_experts", torch.arange(3.0))
    export(tmp_path / "model", student, tiny_pair.tokenizer, Ranks())
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights["model.bias_of_experts"].tolist() == [0, 1, 2]


def test_ranks_2_to_3_to_1(tmp_path: Path, tiny_config: RunConfig) -> None:
    """Saved on two ranks after two steps; on three, on one, and without a break, the third step is the same."""
    path = os.pathsep.join([str(ROOT), str(Path(tip_exp.__file__).parents[1])])
    children = [
        subprocess.Popen([sys.executable, __file__, str(tmp_path), str(rank)], env={**os.environ, "PYTHONPATH": path})
        for rank in range(3)
    ]
    try:
        assert [child.wait(timeout=400) for child in children] == [0, 0, 0]
    finally:
        for child in children:
            child.kill()
            child.wait()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "two").state_dict()
    assert "lm_head.weight" in expected  # tied
    model = qwen3()
    optimizer = adamw(model)
    newest = checkpoints_in(tmp_path / "checkpoint").newest()
    assert newest is not None and newest.step == 2
    newest.load(model, optimizer)
    whole_step(model, optimizer)
    for weights in (model.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path / "three").state_dict()):
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)
    fresh = qwen3().state_dict()
    assert all(float((fresh[name] - value).abs().max()) > 1e-2 for name, value in expected.items())


def qwen3() -> PreTrainedModel:
    """Random weights; 97 tokens and width 16 do not divide by 3."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True)).eval()


def loss_of(model: PreTrainedModel) -> Tensor:
    """The same tokens on every rank."""
    ids = torch.arange(40)[None]
    weight = model.get_input_embeddings().weight
    weight = getattr(weight, "full_tensor", lambda: weight)()
    hidden = model.base_model(inputs_embeds=nn.functional.embedding(ids, weight), use_cache=False).last_hidden_state
    return nn.functional.cross_entropy((hidden @ weight.T)[0, :-1], ids[0, 1:])


def whole_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def one_rank(folder: Path, rank: int) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    def sharded(world: int) -> tuple[PreTrainedModel, torch.optim.AdamW]:
        """FSDP2 per layer; the tied vocabulary matrix a DTensor of its own; one optimizer."""
        model, mesh = qwen3(), init_device_mesh("cpu", (world,))
        embedding = model.get_input_embeddings()
        embedding.weight = nn.Parameter(distribute_tensor(embedding.weight.detach(), mesh, [Shard(0)]))
        model.get_output_embeddings().weight = embedding.weight
        for layer in model.base_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model.base_model, mesh=mesh, ignored_params={embedding.weight})
        return model, adamw(model)

    def join(world: int) -> tuple[Ranks, Checkpoints]:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
        return Ranks(), Checkpoints(folder / "checkpoint", Ranks())

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "src/tip_exp/assets/tiny/student")
    if rank < 2:
        ranks, checkpoints = join(2)
        model, optimizer = sharded(2)
        for step in (1, 2, 3):
            whole_step(model, optimizer)
            with torch.no_grad():  # as an evaluation does; FSDP2 leaves the final norm whole
                loss_of(model)
            if step > 1:
                checkpoints.save(step, model, optimizer, "hf")
        checkpoints.wait()
        export(folder / "two", model, tokenizer, ranks)
        with full_disk():
            if rank == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            checkpoints.save(4, model, optimizer, "hf")
            try:
                checkpoints.wait()
            except CheckpointError as error:
                assert "File too large" in str(error)
            else:
                raise AssertionError("rank 1 could not write, and both ranks must know")
        newest = checkpoints.newest()
        assert newest is not None and newest.step == 3
        dist.barrier()
        if rank == 0:
            victim = folder / "checkpoint" / "step_00003" / "__1_0.distcp"
            victim.write_bytes(flipped(victim.read_bytes()))
        dist.barrier()
        dist.destroy_process_group()
    ranks, checkpoints = join(3)
    model, optimizer = sharded(3)
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 2  # one rank alone sees the torn file
    newest.load(model, optimizer)
    whole_step(model, optimizer)
    export(folder / "three", model, tokenizer, ranks)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]), int(sys.argv[2]))
